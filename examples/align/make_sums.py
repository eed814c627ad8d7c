"""Write the arithmetic task: sums of two numbers below 100.

    python examples/align/make_sums.py

writes ``sums.jsonl`` and ``sums_heldout.jsonl`` next to this file, always the same bytes. A tenth of the pairs of
numbers is held out, chosen by a hash: a rule such as "the last digit is 0" would hold out a kind of sums. Numbers have
two digits (``07+45=``), and the digits of an answer are written from the last to the first (``25``), in the order in
which one adds by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
LIMIT = 100
HELDOUT_SHARE = 0.1


def is_held_out(a: int, b: int) -> bool:
    """Whether a pair is held out, in either order."""
    digest = sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def sums(*, held_out: bool) -> Iterator[dict[str, str]]:
    """The rows of one split, in a fixed random order."""
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT) if is_held_out(a, b) == held_out]
    Random("sums").shuffle(pairs)
    for a, b in pairs:
        yield {"prompt": f"{a:02}+{b:02}=", "completion": str(a + b)[::-1]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the arithmetic task.")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    for name, held_out in (("sums", False), ("sums_heldout", True)):
        rows = list(sums(held_out=held_out))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
