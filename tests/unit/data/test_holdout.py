"""Held-out rows: nothing leaks to the training side, and rows that are added change nothing for the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ingle.config.data import DataConfig
from ingle.config.objective import Classify, ObjectiveConfig
from ingle.data import TokenDataset, build_dataset, dataset_builder, hold_out
from ingle.data.holdout import choose, find_groups
from ingle.errors import DataError
from ingle.events import Event, Warned
from tests.unit.data.test_dataset import chat, write

_WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "question",
    "answer",
    "hello",
    "world",
    "how",
    "are",
    "you",
    "today",
    "what",
    "is",
    "two",
]
SHARE = 0.1


def _texts(num: int, seed: int = 0, words: int = 14) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(_WORDS, words)) for _ in range(num)]


def _build(
    folder: Path, rows: Sequence[object], tokenizer, objective: ObjectiveConfig | str = "sft", **options
) -> TokenDataset:
    folder.mkdir(exist_ok=True)
    source = write(folder / "rows.jsonl", *rows)
    data = DataConfig.model_validate({"sources": [source], "validation": SHARE, **options})
    return build_dataset(data, tokenizer, objective=objective)


def _side(dataset: TokenDataset, seed: int = 0, share: float = SHARE) -> npt.NDArray[np.bool_]:
    return choose(find_groups(dataset), share, seed)


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Rows of which some have the same prompt, and some nearly repeat another one."""
    texts = _texts(400, words=30)
    rows = [{"prompt": text[:30], "completion": text[30:]} for text in texts]
    rows += [{"prompt": row["prompt"].upper(), "completion": "today"} for row in rows[:60]]
    return rows + [{"prompt": row["prompt"] + "?", "completion": row["completion"]} for row in rows[60:120]]


def test_same_prompts_and_near_duplicates_stay_on_one_side(tmp_path, tokenizer, rows) -> None:
    dataset = _build(tmp_path, rows, tokenizer)
    assert len(dataset) == len(rows)
    for seed in range(5):
        side = _side(dataset, seed)
        assert (side[400:460] == side[:60]).all(), "the same prompt in other letters"
        assert (side[460:] == side[60:120]).all(), "one sign is different"
        assert 0.5 * SHARE <= side.mean() <= 2 * SHARE
    assert (_side(dataset, 0) != _side(dataset, 1)).any()


def test_a_conversation_that_was_cut_at_several_turns_stays_on_one_side(tmp_path, tokenizer, monkeypatch) -> None:
    texts = _texts(320)
    whole = [chat(*texts[i : i + 8]) for i in range(0, 320, 8)]
    cuts = [{"messages": row["messages"][:end]} for row in whole for end in (2, 4, 6, 8)]
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "cache"))
    for cached_bytes in (1 << 30, 1):
        monkeypatch.setattr(dataset_builder, "_CACHED_BYTES", cached_bytes)
        for seed in range(3):
            side = _side(_build(tmp_path, cuts, tokenizer), seed, 0.2).reshape(-1, 4)
            assert (side == side[:, :1]).all() and 0 < side.mean() < 0.5


@pytest.mark.parametrize("kind", ["classify", "answer"])
def test_rows_about_one_text_stay_on_one_side(tmp_path, tokenizer, kind) -> None:
    asked, rows = _texts(300, seed=1), []
    for number, context in enumerate(_texts(60, words=25)):
        for other in asked[number * 5 : number * 5 + 5]:
            first = {"answer_start": 0, "text": context.split()[0]}
            pair = {"premise": context, "hypothesis": other, "label": len(rows) % 2}
            rows.append(pair if kind == "classify" else {"question": other, "context": context, "answers": [first]})
    objective = Classify(kind="classify", labels=["no", "yes"], problem="single") if kind == "classify" else "answer"
    side = _side(_build(tmp_path, rows, tokenizer, objective)).reshape(60, 5)
    assert (side == side[:, :1]).all() and 0.5 * SHARE <= side.mean() <= 2 * SHARE


def test_a_first_text_that_all_rows_have_does_not_unite_them(tmp_path, tokenizer) -> None:
    rows = [{"text": "Is it good?", "text_pair": text, "label": i % 2} for i, text in enumerate(_texts(200))]
    labels = Classify(kind="classify", labels=["no", "yes"], problem="single")
    assert 0.5 * SHARE <= _side(_build(tmp_path, rows, tokenizer, labels)).mean() <= 2 * SHARE


def test_rows_keep_their_side_when_others_are_added_or_moved(tmp_path, tokenizer, rows) -> None:
    side = _side(_build(tmp_path / "all", rows, tokenizer))
    moved = np.random.default_rng(0).permutation(len(rows))
    assert (_side(_build(tmp_path / "moved", [rows[i] for i in moved], tokenizer)) == side[moved]).all()
    fewer = [*range(200), *range(400, 520)]
    assert (_side(_build(tmp_path / "fewer", [rows[i] for i in fewer], tokenizer)) == side[fewer]).all()


def test_a_cached_dataset_is_split_like_one_in_memory(tmp_path, tokenizer, rows, monkeypatch) -> None:
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "cache"))
    expected = _side(_build(tmp_path, rows, tokenizer))
    monkeypatch.setattr(dataset_builder, "_CACHED_BYTES", 1)
    cached = _build(tmp_path, rows, tokenizer)
    assert cached.memo is not None
    assert (_side(cached) == expected).all()
    (file,) = (tmp_path / "cache").rglob("*.groups.npy")
    assert (np.load(file) == find_groups(cached)).all()


def test_a_group_with_most_of_the_rows_is_trained_on() -> None:
    groups = np.array([7] * 90 + list(range(100, 110)), np.uint64)
    for seed in range(50):
        assert not choose(groups, 0.05, seed)[:90].any()


def test_few_groups_give_at_least_half_of_the_share() -> None:
    groups = np.repeat(np.arange(61, dtype=np.uint64), 30)
    shares = [choose(groups, 0.02, seed).mean() for seed in range(50)]
    assert min(shares) >= 0.01


def test_one_group_cannot_be_divided(tmp_path, tokenizer) -> None:
    rows = [{"prompt": "what is two?", "completion": text} for text in _texts(20)]
    with pytest.raises(DataError, match="all of them have the same prompt"):
        _side(_build(tmp_path, rows, tokenizer))


def test_the_pieces_of_one_long_text_are_divided(tmp_path, tokenizer) -> None:
    text = " ".join(_texts(400))
    dataset = _build(tmp_path, [{"text": text}], tokenizer, objective="clm", max_seq_len=64)
    assert len(dataset) > 100
    assert 0 < _side(dataset).mean() < 2 * SHARE


def test_training_and_held_out_sequences_contain_every_document_once(tmp_path, tokenizer, rows) -> None:
    dataset = _build(tmp_path, rows, tokenizer)
    data = DataConfig.model_validate({"sources": ["rows"], "validation": SHARE, "max_seq_len": 128})
    training, held_out = hold_out(dataset, data, 0, _unused)
    assert held_out is not None and held_out.dataset is dataset
    documents = [int(i) for sequences in (training, held_out.sequences) for sequence in sequences for i in sequence]
    assert sorted(documents) == list(range(len(rows)))
    assert sorted(int(i) for sequence in held_out.sequences for i in sequence) == held_out.documents.tolist()
    assert all(dataset.lengths[sequence].sum() <= 128 for sequence in training)
    side = _side(dataset)
    assert held_out.documents.tolist() == np.flatnonzero(side).tolist()
    prompts = [rows[i]["prompt"].lower() for i in held_out.documents]
    for (one, first), (other, second) in pairwise(sorted(zip(prompts, held_out.groups.tolist(), strict=True))):
        assert first == second or one != other or not one, "one prompt, one group"


def test_validation_rows_that_are_trained_on_are_reported(tmp_path, tokenizer, rows) -> None:
    training = _build(tmp_path / "training", rows[:100], tokenizer)
    other = _build(tmp_path / "other", [*rows[90:100], *rows[200:230]], tokenizer)
    warnings: list[Event] = []
    data = DataConfig.model_validate({"sources": ["rows"], "validation": {"sources": ["other"]}})
    sequences, held_out = hold_out(training, data, 0, lambda data: other, warnings.append)
    assert held_out is not None and held_out.dataset is other
    assert sum(map(len, sequences)) == 100 and len(held_out.documents) == 40
    (warning,) = [event for event in warnings if isinstance(event, Warned)]
    assert "10 of 40 validation rows" in warning.message


def test_a_first_text_that_all_rows_have_is_no_repetition(tmp_path, tokenizer) -> None:
    texts = _texts(60)
    rows = [{"text": "Is it good?", "text_pair": text, "label": i % 2} for i, text in enumerate(texts)]
    labels = Classify(kind="classify", labels=["no", "yes"], problem="single")
    training = _build(tmp_path / "training", rows[:40], tokenizer, labels)
    other = _build(tmp_path / "other", [*rows[37:40], *rows[40:]], tokenizer, labels)
    data = DataConfig.model_validate({"sources": ["rows"], "validation": {"sources": ["other"]}})
    warnings: list[Event] = []
    hold_out(training, data, 0, lambda data: other, warnings.append)
    (warning,) = [event for event in warnings if isinstance(event, Warned)]
    assert "3 of 23 validation rows" in warning.message


def test_few_independent_rows_are_reported(tmp_path, tokenizer) -> None:
    dataset = _build(tmp_path, [{"text": text} for text in _texts(30)], tokenizer, objective="clm")
    data = DataConfig.model_validate({"sources": ["rows"], "validation": SHARE})
    warnings: list[Event] = []
    hold_out(dataset, data, 0, _unused, warnings.append)
    (warning,) = [event for event in warnings if isinstance(event, Warned)]
    assert "rough estimate" in warning.message


def _unused(data: DataConfig) -> TokenDataset:
    raise AssertionError("there are no other sources")
