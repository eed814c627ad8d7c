"""The pre-training corpus: the same bytes every time, and English that keeps its own rules."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

NUM_ROWS = 1_500


def write_corpus(
    examples: Path, output: Path, *, processes: int, hash_seed: str, books: tuple[Path, ...] = ()
) -> dict[str, str]:
    """Run the script in a fresh interpreter; name -> digest of each file."""
    command = [
        sys.executable,
        str(examples / "pretrain" / "make_corpus.py"),
        "--output",
        str(output),
        "--num-shards",
        "3",
        "--rows-per-shard",
        "150",
        "--processes",
        str(processes),
    ]
    if books:
        command += ["--public-domain", *map(str, books)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}


@pytest.fixture(scope="module")
def rows(corpus_script: ModuleType) -> list[dict[str, Any]]:
    return list(corpus_script.rows("a test", NUM_ROWS))


@pytest.fixture(scope="module")
def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows if "text" in row] + [
        m["content"] for row in rows for m in row.get("messages", ())
    ]


def test_bytes_depend_neither_on_processes_nor_on_hash_seed(examples: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Paragraph {i} of a book. {'It goes on and on. ' * 20}\n\n" for i in range(200)))
    one, two = tmp_path / "one", tmp_path / "two"
    digests = write_corpus(examples, one, processes=1, hash_seed="1", books=(book,))
    assert digests == write_corpus(examples, two, processes=3, hash_seed="2", books=(book,))
    assert len(digests) == 3 * 2 + 2 + 2  # shards, held-out, books and held-out books


def test_text_is_that_on_which_the_bundled_model_was_trained(corpus_script: ModuleType) -> None:
    """Whoever changes the grammar or the order of random draws must train the model again, or keep it as it is."""
    lines = "".join(json.dumps(row) + "\n" for row in corpus_script.rows("0 shard 0", 300))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "693706ebac959329"


def test_no_row_appears_twice_nor_in_training_and_held_out(examples: Path, tmp_path: Path) -> None:
    write_corpus(examples, tmp_path, processes=2, hash_seed="0")
    lines = [line for path in tmp_path.iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 400
    assert len(set(lines)) == len(lines)


def test_duplicates_are_dropped_from_later_files(corpus_script: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("x\ny\n")
    second.write_text("y\nz\nz\n")
    assert corpus_script.drop_duplicates([first, second]) == (3, 2, 6)
    assert second.read_text() == "z\n"


def test_about_a_tenth_are_conversations_that_alternate(rows: list[dict[str, Any]]) -> None:
    conversations = [row["messages"] for row in rows if "messages" in row]
    assert 0.07 < len(conversations) / len(rows) < 0.13
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in messages)


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("an unfilled slot or choice", r"[{}\[\]<>|]"),
        ("two spaces", r"  "),
        ("a space before a stop", r" [,.;!?]"),
        ("two stops", r"\.\.|,,|\.,|!\.|\?\."),
        ("a before a vowel", r"\b[Aa] (?!one\b|uni|use|eu)[aeiou]\w"),
        ("an before a consonant", r"\b[Aa]n (?!hour|honest|heir|8|11\b|18\b)[^aeiouAEIOU8\W]"),
        ("a small letter after a stop", r"(?<!\d)[.!?] [a-z]"),
        ("space at a line's end", r" \n|\n "),
        ("a doubled word", r"\b(the|a|and|to|of|in|was|is|he|she|it) \1\b"),
    ],
)
def test_text_is_free_of(texts: list[str], fault: str, pattern: str) -> None:
    found = [text for text in texts if re.search(pattern, text)]
    assert not found, f"{fault}: {found[0]!r}"


def test_prose_begins_with_a_capital_and_ends_with_a_stop(corpus_script: ModuleType) -> None:
    rng = Random("prose")
    for section in ("story", "describe", "free", "letter", "diary"):
        for _ in range(80):
            scene, _ = corpus_script.new_scene(rng)
            text = scene.section(section)
            assert text.lstrip('"')[0].isupper(), text
            assert text[-1] in '.!?"' or section == "letter", text


def test_people_keep_their_pronouns(corpus_script: ModuleType) -> None:
    rng = Random("pronouns")
    for _ in range(200):
        scene, _ = corpus_script.new_scene(rng)
        is_woman = scene["p"] in scene.lexicon["female"] or scene["p"].startswith("Mrs")
        assert (scene["p.he"], scene["p.his"]) == (("she", "her") if is_woman else ("he", "his"))


def test_grammar_mentions_nothing_that_is_not_there(corpus_script: ModuleType) -> None:
    """Every entry of every section can be written, not just those a sample happened to meet."""
    rng = Random("all")
    scene, _ = corpus_script.new_scene(rng)
    written = 0
    for key, entries in scene.lexicon.items():
        if key.startswith(("fact.", "frames.")):  # pairs, and frames that Python fills
            continue
        for entry in entries:
            fresh, _ = corpus_script.new_scene(rng)
            fresh.values.update({"it": "key", "n": "Rusty", "t": "baker", "x": "ball", "his": "her"})
            fresh.values.update({f"{name}{i}": "lamp" for name in "ao" for i in (1, 2, 3)})
            text = fresh.write(entry)
            assert not re.search(r"[{}\[\]|]", text), (key, entry)
            written += 1
    assert written > 1_500


def test_sums_are_right(corpus_script: ModuleType) -> None:
    numbers = sys.modules["prose.numbers"]
    operations = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__, "divided by": int.__floordiv__}
    rng, checked = Random("sums"), 0
    for _ in range(2_000):
        scene, _ = corpus_script.new_scene(rng)
        _, answer = numbers.exercise(scene)
        if match := re.fullmatch(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)\.", answer):
            assert operations[match[2]](int(match[1]), int(match[3])) == int(match[4])
            checked += 1
    assert checked > 50


def test_public_domain_passages_hold_the_whole_book(corpus_script: ModuleType, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}. " + "Words and words. " * (i % 9 + 1) for i in range(120)]
    book.write_text("\n\n".join(paragraphs))
    passages = list(sys.modules["prose.public_domain"].passages(book))
    assert len(passages) > 3
    assert " ".join(" ".join(passages).split()) == " ".join(" ".join(paragraphs).split())
    assert max(map(len, passages)) < 2 * 1_600


def test_the_demo_task_is_not_in_the_corpus(texts: list[str], examples: Path) -> None:
    lines = (examples / "demo" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line)["messages"][0]["content"] for line in lines]
    assert not set(requests) & set(texts)
    assert not any("noticeboard" in text for text in texts)
