"""Writes the data of the examples with labels: classified reviews, tagged sentences, and questions about a text.

    python examples/make_labelled.py

writes ``train`` and ``heldout`` files into ``classify/``, ``tag/`` and ``answer/``, always the same bytes. Held-out
rows have sentence frames that no training row has, and often words and names that no training row has.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
NUM_ROWS: Mapping[str, tuple[int, int]] = {"classify": (3000, 400), "tag": (2000, 300), "answer": (1500, 250)}
UNSEEN_SHARE = 0.5  # of the words of held-out rows
NO_ANSWER_SHARE = 0.2  # of the questions

Row = dict[str, object]
_VOWELS = tuple("aeio")


class Phrases:
    """The lines of ``phrases.txt`` by section; those with ``*`` are for held-out rows.

    Args:
        path: The file.
        rng: Chooses lines.
        is_heldout: Whether rows are held out.
    """

    def __init__(self, path: Path, rng: Random, *, is_heldout: bool) -> None:
        self.rng, self.is_heldout = rng, is_heldout
        self._seen: dict[str, list[str]] = {}
        self._unseen: dict[str, list[str]] = {}
        name = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("== "):
                name = line[3:]
            elif line and not line.startswith("#"):
                kept = self._unseen if line.startswith("* ") else self._seen
                kept.setdefault(name, []).append(line.removeprefix("* "))

    def frame(self, section: str) -> str:
        """Returns a line of training, or always one of the held-out lines."""
        return self.rng.choice((self._unseen if self.is_heldout else self._seen)[section])

    def word(self, section: str, but: Sequence[str] = ()) -> str:
        """Returns a line of training, or with a chance of ``UNSEEN_SHARE`` a held-out line; none of ``but``."""
        unseen = self.is_heldout and section in self._unseen and self.rng.random() < UNSEEN_SHARE
        lines = (self._unseen if unseen else self._seen)[section]
        return self.rng.choice([line for line in lines if line not in but])


def make_review(phrases: Phrases) -> Row:
    """A review and its label. Exchanging all praise and blame of a frame changes the label, so frames give no hint."""
    praise, _, blame = phrases.frame("frame").partition("|")
    is_positive = phrases.rng.random() < 0.5
    exchanged = {} if is_positive else {"good": "bad", "bad": "good"}
    used: list[str] = []

    def fill(match: re.Match[str]) -> str:
        name = match[1].removeprefix("a ")
        used.append(phrases.word(exchanged.get(name, name) if not blame else name, used))
        article = "" if name == match[1] else "an " if used[-1].startswith(_VOWELS) else "a "
        return article + used[-1]

    frame = blame if blame and not is_positive else praise
    return {"text": re.sub(r"{([^}]*)}", fill, frame), "label": "positive" if is_positive else "negative"}


def make_sentence(phrases: Phrases) -> list[tuple[str, str]]:
    """Words with their tags: B- begins a person, a place or an organization, I- continues it."""
    kinds = {"person": "PER", "surname": "PER", "place": "LOC", "organization": "ORG"}
    tagged: list[tuple[str, str]] = []
    used: list[str] = []
    for word in phrases.frame("frame").split():
        slot = re.fullmatch(r"{(\w+)}", word)
        if slot is None:
            tagged.append((word.removeprefix('"'), "O"))
            continue
        name = _name(phrases, slot[1], used)
        used.append(name)
        kind = kinds.get(slot[1])
        for number, part in enumerate(name.split()):
            tagged.append((part, "O" if kind is None else f"{'I' if number else 'B'}-{kind}"))
    return [pair for pair in tagged if pair[0]]


def _name(phrases: Phrases, slot: str, used: Sequence[str]) -> str:
    if slot == "year":
        return str(phrases.rng.randrange(1900, 2000))
    if slot == "person":
        return f"{phrases.word('first')} {phrases.word('surname')}"
    return re.sub(r"{(\w+)}", lambda match: phrases.word(match[1]), phrases.word(slot, used))


def make_question(phrases: Phrases) -> Row:
    """A context about two people, and a question about one of them, which the context may not answer."""
    rng = phrases.rng
    facts = ["born", "year", "trade", "teacher", "made"]
    people = [phrases.word("person")]
    people.append(phrases.word("person", people))
    known = {(name, fact): _value(phrases, fact, people) for name in people for fact in rng.sample(facts, 4)}
    missing = [(name, fact) for name in people for fact in facts if (name, fact) not in known]
    sentences = {
        each: phrases.frame(each[1]).replace("{name}", each[0]).replace("{value}", value)
        for each, value in known.items()
    }
    order: list[tuple[str, str]] = list(sentences)
    rng.shuffle(order)
    parts = [(sentences[each], each) for each in order]
    parts.insert(rng.randrange(len(parts) + 1), (phrases.word("filler"), ("", "")))
    asked = rng.choice(missing if rng.random() < NO_ANSWER_SHARE else order)
    context, start = "", -1
    for sentence, each in parts:
        sentence = _join(sentence)
        if each == asked:
            start = len(context) + sentence.lower().index(_join(known[asked]).lower())
        context += sentence + " "
    context = context.strip()
    found = [context[start : start + len(_join(known[asked]))]] if start >= 0 else []
    question = _join(phrases.frame(f"{asked[1]}?").replace("{name}", asked[0]))
    return {
        "question": question,
        "context": context,
        "answers": {"text": found, "answer_start": [start] if found else []},
    }


def _value(phrases: Phrases, fact: str, people: Sequence[str]) -> str:
    match fact:
        case "year":
            return str(phrases.rng.randrange(1650, 1900))
        case "teacher":
            return phrases.word("person", people)
        case _:
            return phrases.word({"born": "town", "trade": "trade name", "made": "work"}[fact])


def _join(sentence: str) -> str:
    """Removes the space before punctuation, and begins with a capital."""
    joined = re.sub(r" ([.,?;:])", r"\1", sentence)
    return joined[0].upper() + joined[1:]


def draw(make: Callable[[Phrases], object], phrases: Phrases, count: int, taken: set[str]) -> Iterator[object]:
    """Yields different rows, none of which is in ``taken``."""
    found = 0
    while found < count:
        row = make(phrases)
        key = json.dumps(row)
        if key not in taken:
            taken.add(key)
            found += 1
            yield row


def write_splits(output: Path, kind: str, make: Callable[[Phrases], object], show: Callable[[object], str]) -> None:
    """Writes the two files of an objective."""
    taken: set[str] = set()
    for split, count in zip(("train", "heldout"), NUM_ROWS[kind], strict=True):
        phrases = Phrases(HERE / kind / "phrases.txt", Random(f"{kind} {split}"), is_heldout=split == "heldout")
        text = "".join(map(show, draw(make, phrases, count, taken)))
        path = output / kind / f"{split}{'.conll' if kind == 'tag' else '.jsonl'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {count:,} rows, {len(text.encode()) / 1e6:.2f} MB")


def _show_json(row: object) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _show_conll(row: object) -> str:
    assert isinstance(row, list)
    return "".join(f"{word} {tag}\n" for word, tag in row) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the data of the examples with labels.")
    parser.add_argument("--output", type=Path, default=HERE)
    output = parser.parse_args(arguments).output
    write_splits(output, "classify", make_review, _show_json)
    write_splits(output, "tag", make_sentence, _show_conll)
    write_splits(output, "answer", make_question, _show_json)


if __name__ == "__main__":
    main()
