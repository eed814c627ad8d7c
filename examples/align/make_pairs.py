"""Write pairs of a faithful and an unfaithful notice for the same record.

    python examples/align/make_pairs.py

writes ``pairs.jsonl`` and ``heldout.jsonl`` next to this file, always the same bytes. Both notices of a pair begin with
the same sentence frame and make the same choices of words. The worse one has another value than the record, lacks an
optional value, or has one that the record lacks; these are equally frequent, so that length says little about which
one is better.

    python examples/align/make_pairs.py --model examples/models/ember-6m-notices

writes ``own.jsonl``: pairs of answers that a model itself gave to the records of ``pairs.jsonl``. Of several sampled
answers, the first faithful one is chosen and the first unfaithful one rejected; where no answer is faithful, the notice
of ``pairs.jsonl`` is chosen. With another machine or number of threads, the model may sample other answers.

No pair has a record of the demo's rows; the held-out ones have none of the training pairs' records, and
a quarter of them have values that no training record has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

from faithfulness import find_faults  # noqa: E402 - scripts are no package
from make_task import REQUEST, Kind, Noticeboard, Record, make_splits, record_line  # noqa: E402

SEED = "faithful"
NUM_PAIRS = {"pairs": 2_000, "heldout": 300}
UNSEEN_SHARE = 0.25
#: Records that a model answers itself, and its answers to each.
NUM_OWN, NUM_ANSWERS = 1_200, 4


def swap(board: Noticeboard, kind: Kind, record: Record) -> Record | None:
    """A record with another value in one of its fields."""
    sections = {**kind.fields, **kind.options}
    field = board.rng.choice(sorted(record))
    others = [value.text for value in board.values[sections[field]] if value.text.lower() not in _text_of(record)]
    return {**record, field: board.rng.choice(others)} if others else None


def drop(board: Noticeboard, kind: Kind, record: Record) -> Record | None:
    """A record without one of its optional values; None if it has none, or if one needs the other."""
    options = sorted(record.keys() & kind.options.keys()) if kind.name != "found" else []
    dropped = board.rng.choice(options) if options else None
    return {field: value for field, value in record.items() if field != dropped} if dropped else None


def invent(board: Noticeboard, kind: Kind, record: Record) -> Record | None:
    """A record with one more optional value; None if it has all of them."""
    options = sorted(kind.options.keys() - record.keys()) if kind.name != "found" else []
    if not options:
        return None
    field = board.rng.choice(options)
    values = [value.text for value in board.values[kind.options[field]] if value.text.lower() not in _text_of(record)]
    return {**record, field: board.rng.choice(values)}


CHANGES: dict[str, Callable[[Noticeboard, Kind, Record], Record | None]] = {
    "swapped": swap,
    "dropped": drop,
    "invented": invent,
}


def _text_of(record: Record) -> str:
    return " | ".join(record.values()).lower()


def _notice(board: Noticeboard, kind: Kind, record: Record, key: str) -> str:
    """The notice that a key chooses: the same wording for every version of a record."""
    board.rng = Random(key)
    return board.notices(kind, record, 1)[0]


def make_pairs() -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the split and the row of every pair."""
    board = Noticeboard(Random(SEED))
    seen = {row["messages"][0]["content"] for rows in make_splits().values() for row in rows}  # type: ignore[index]
    for split, total in NUM_PAIRS.items():
        made, draws = 0, 0
        while made < total:
            draws += 1
            board.rng = Random(f"{SEED} {split} {draws}")
            is_unseen = split == "heldout" and made < UNSEEN_SHARE * total
            drawn = board.draw(num_unseen=board.rng.choice((1, 2)) if is_unseen else 0)
            change = list(CHANGES)[made % len(CHANGES)]
            row = None if drawn is None else _pair(board, *drawn, change)
            if row is None or row["prompt"] in seen:
                continue
            seen.add(row["prompt"])
            made += 1
            yield split, row


def _pair(board: Noticeboard, kind: Kind, record: Record, change: str) -> dict[str, str] | None:
    """The row of a record; None if the change is not possible or cannot be seen."""
    changed = CHANGES[change](board, kind, record)
    if changed is None:
        return None
    ordered = {name: changed[name] for name in (*kind.fields, *kind.options) if name in changed}
    prompt, key = REQUEST + record_line(record), f"{SEED} {record_line(record)}"
    chosen, rejected = (_notice(board, kind, each, key) for each in (record, ordered))
    if find_faults(prompt, chosen) or not find_faults(prompt, rejected):
        return None  # a value that two fields share, or that the wording contains
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "change": change}


def own_pairs(model: str, rows: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yields pairs of the answers that a model gave itself."""
    from ingle.data import Message
    from ingle.inference import open_model

    engine = open_model(model)
    prompts = [[Message("user", row["prompt"])] for row in rows for _ in range(NUM_ANSWERS)]
    found = engine.generate(prompts, max_new_tokens=64, temperature=1.0, seed=0, batch_size=200)
    for number, row in enumerate(rows):
        answers = [each.text for each in found[number * NUM_ANSWERS : (number + 1) * NUM_ANSWERS]]
        good = [answer for answer in answers if not find_faults(row["prompt"], answer)]
        bad = [answer for answer in answers if find_faults(row["prompt"], answer)]
        if bad:
            yield {"prompt": row["prompt"], "chosen": (good or [row["chosen"]])[0], "rejected": bad[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write pairs of faithful and unfaithful notices.")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--model", help="write pairs of this model's own answers")
    options = parser.parse_args(arguments)
    if options.model:
        given = map(json.loads, (HERE / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_OWN])
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own_pairs(options.model, list(given)))
        (options.output / "own.jsonl").write_text(text, encoding="utf-8")
        print(f"own: {text.count(chr(10)):,} pairs, {len(text.encode()) / 1e6:.2f} MB")
        return
    lines: dict[str, list[str]] = {split: [] for split in NUM_PAIRS}
    for split, row in make_pairs():
        lines[split].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, rows in lines.items():
        (options.output / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"{split}: {len(rows):,} pairs, {sum(map(len, rows)) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
