"""Write the demo's task: records of a village noticeboard, and the notices that say the same in friendly sentences.

    python examples/demo/make_task.py

writes ``train.jsonl`` and ``heldout.jsonl`` beside this file, always the same bytes. Each row holds one conversation
(record in, notice out), a held-out one also further notices for the same record in ``references``: an answer that words
its record in another way is no worse for it. The two splits share no record and no
pair of a record's first two values; a quarter of the held-out records also hold values that no training record has
(lines with ``*`` in ``values.txt``), which the model has to copy without having seen them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
SEED = "noticeboard"
NUM_TRAIN, NUM_HELDOUT = 5_000, 300
NUM_REFERENCES = {"train": 0, "heldout": 4}  # besides the answer in the conversation
UNSEEN_SHARE = 0.25
REQUEST = "Please write this up.\n"

Record = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """A kind of notice: field -> section of ``values.txt``; ``options`` may be missing from a record."""

    name: str
    fields: Mapping[str, str]
    options: Mapping[str, str]


KINDS = (
    Kind(
        "event",
        {"event": "event", "place": "place", "day": "day", "time": "time"},
        {"price": "price", "note": "note", "host": "person"},
    ),
    Kind(
        "lost", {"lost": "lost", "near": "near", "day": "day", "owner": "person"}, {"reward": "reward", "home": "home"}
    ),
    Kind("found", {"found": "found", "near": "near", "day": "day"}, {"person": "person", "home": "home"}),
    Kind(
        "sale",
        {"sale": "sale", "price": "saleprice", "seller": "person"},
        {"condition": "condition", "home": "home", "day": "day"},
    ),
    Kind(
        "class",
        {"class": "class", "place": "place", "day": "day", "time": "time", "teacher": "person"},
        {"price": "lessonprice", "bring": "bring"},
    ),
    Kind(
        "warning", {"warning": "warning", "where": "where"}, {"until": "until", "advice": "advice", "person": "person"}
    ),
    Kind(
        "wanted",
        {"wanted": "wanted", "task": "task", "place": "place", "day": "day"},
        {"time": "time", "reward": "reward", "person": "person"},
    ),
)
WEIGHTS = (9, 3, 3, 4, 5, 3, 4)
LABELS = {"home": "ask", "where": "place", "near": "place"}  # what the record calls a field


def read_sections(path: Path) -> dict[str, list[str]]:
    """``== name`` and the lines below it."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            lines = sections.setdefault(line[3:].strip(), [])
        elif line.strip() and not line.startswith("#"):
            lines.append(line.strip())
    return sections


@dataclass(frozen=True)
class Value:
    """A value, its tags by group, and whether it is kept from training."""

    text: str
    tags: Mapping[str, frozenset[str]]
    is_unseen: bool

    @classmethod
    def parse(cls, line: str) -> Value:
        """Read ``* text ; group.tag group.tag``."""
        text, _, tags = line.removeprefix("* ").partition(";")
        groups: dict[str, frozenset[str]] = {}
        for tag in tags.split():
            group, _, member = tag.partition(".")
            groups[group] = groups.get(group, frozenset()) | {member}
        return cls(text.strip(), groups, line.startswith("*"))

    def suits(self, other: Value) -> bool:
        """Whether both share a tag of every group that both have."""
        return all(self.tags[group] & other.tags[group] for group in self.tags.keys() & other.tags.keys())


class Noticeboard:
    """Draws records and words them."""

    def __init__(self, rng: Random) -> None:
        """Read the values and frames beside this file."""
        self.rng = rng
        self.values = {
            name: [Value.parse(line) for line in lines] for name, lines in read_sections(HERE / "values.txt").items()
        }
        self.frames = read_sections(HERE / "frames.txt")

    def draw(self, *, num_unseen: int) -> tuple[Kind, Record] | None:
        """A record, ``num_unseen`` of its values from the held-out lists; None when no values would suit each other."""
        kind = self.rng.choices(KINDS, WEIGHTS)[0]
        fields = dict(kind.fields) | self._options(kind)
        unseen = set(self.rng.sample(sorted(fields), min(num_unseen, len(fields))))
        record: Record = {}
        chosen: list[Value] = []
        for field, section in fields.items():
            choices = [value for value in self.values[section] if value.is_unseen == (field in unseen)]
            if field == "day" and kind.name == "class":
                choices = [value for value in choices if value.text.isalpha()]
            fitting = [value for value in choices if all(value.suits(other) for other in chosen)]
            if not fitting:
                return None
            chosen.append(self.rng.choice(fitting))
            record[field] = chosen[-1].text
        return kind, record

    def _options(self, kind: Kind) -> dict[str, str]:
        if kind.name == "found":  # who keeps it and where go together
            return dict(kind.options)
        chosen = set(self.rng.sample(sorted(kind.options), self.rng.choice((0, 0, 1, 1))))
        return {field: section for field, section in kind.options.items() if field in chosen}

    def notices(self, kind: Kind, record: Record, count: int) -> list[str]:
        """``count`` wordings of a record that begin with different main sentences."""
        heads = self.rng.sample(self.frames[kind.name], count)
        return [self._notice(kind, record, head) for head in heads]

    def _notice(self, kind: Kind, record: Record, head: str) -> str:
        sections = []
        for field in kind.options:
            if field in record and not (kind.name == "found" and field == "home"):
                is_free = field == "price" and record[field] == "free"
                sections.append(f"{kind.name}.{'free' if is_free else field}")
        if len(sections) > 1 and self.rng.random() < 0.4:
            sections.reverse()
        frames = [head, *(self.rng.choice(self.frames[section]) for section in sections)]
        return " ".join(fill(self._choose(frame), record) for frame in frames)

    def _choose(self, frame: str) -> str:
        return re.sub(r"\[([^\]]*)\]", lambda match: self.rng.choice(match[1].split("|")), frame).strip()


def fill(frame: str, record: Record) -> str:
    """Put a record's values into a frame.

    ``{field}`` is the value, ``{Field}`` has a capital, ``{a field}`` its article, ``{there field}`` "there is".
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("a "):
            noun = record[name[2:]]
            return ("an " if noun[0] in "aeio" else "a ") + noun
        if name.lower().startswith("there "):
            thing = record[name[6:]]
            is_plural = thing.endswith("s") and not thing.startswith(("a ", "an "))
            return f"{name[:5]} {'are' if is_plural else 'is'} {thing}"
        text = record[name.lower()]
        return text[0].upper() + text[1:] if name[0].isupper() else text

    return re.sub(r"\{([^}]*)\}", value, frame)


def record_line(record: Record) -> str:
    """The record as the model sees it."""
    return " | ".join(f"{LABELS.get(field, field)}: {value}" for field, value in record.items())


def row(record: Record, notices: Sequence[str]) -> dict[str, object]:
    """One JSONL row."""
    first, *others = notices
    messages = [
        {"role": "user", "content": REQUEST + record_line(record)},
        {"role": "assistant", "content": first},
    ]
    return {"messages": messages} | ({"references": others} if others else {})


def make_splits() -> dict[str, list[dict[str, object]]]:
    """Both splits, disjoint in records and in pairs of a record's first two values."""
    board = Noticeboard(Random(SEED))
    seen: set[str] = set()
    pairs: set[tuple[str, ...]] = set()

    def draw(split: str, total: int) -> Iterator[dict[str, object]]:
        num_rows = 0
        while num_rows < total:
            is_unseen = split == "heldout" and num_rows < UNSEEN_SHARE * total
            drawn = board.draw(num_unseen=board.rng.choice((1, 2)) if is_unseen else 0)
            if drawn is None:
                continue
            kind, record = drawn
            line, pair = record_line(record), tuple(record.values())[:2]
            if line in seen or (split == "train" and pair in pairs):
                continue
            seen.add(line)
            if split == "heldout":
                pairs.add(pair)
            num_rows += 1
            yield row(record, board.notices(kind, record, 1 + NUM_REFERENCES[split]))

    heldout = list(draw("heldout", NUM_HELDOUT))  # first, so that training can keep clear of its pairs
    train = list(draw("train", NUM_TRAIN))
    board.rng.shuffle(heldout)
    return {"train": train, "heldout": heldout}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the demo's task.")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    for split, rows in make_splits().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.output / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(rows):,} rows, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
