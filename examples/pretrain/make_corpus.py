"""Write the pre-training corpus of the bundled base model: English text composed by a grammar, from one seed.

    python examples/pretrain/make_corpus.py --output examples/pretrain/corpus --public-domain BOOK.txt ...

writes ``documents-NNN.jsonl`` (``{"text": ...}``), ``conversations-NNN.jsonl`` (``{"messages": [...]}``) and
``heldout-documents.jsonl``, ``heldout-conversations.jsonl`` from seeds that no training shard uses. A shard depends on
the seed and its number alone, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from prose.conversations import conversation
from prose.documents import document
from prose.grammar import GRAMMAR, Scene, read_lexicon
from prose.people import set_scene
from prose.public_domain import passages
from prose.world import World, country

DOCUMENT_SHARE = 0.9  # of a shard's rows; the rest are conversations


@cache
def _language() -> tuple[dict[str, tuple[str, ...]], World]:
    lexicon = read_lexicon(sorted(GRAMMAR.glob("*.txt")))
    return lexicon, country(lexicon)


def new_scene(rng: Random) -> tuple[Scene, World]:
    """A fresh document's scene."""
    lexicon, world = _language()
    return set_scene(Scene(rng, lexicon), world.names), world


def rows(seed: str, num_rows: int) -> Iterator[dict[str, object]]:
    """``num_rows`` distinct rows, documents and conversations mixed."""
    rng = Random(seed)
    seen: set[bytes] = set()
    while len(seen) < num_rows:
        scene, world = new_scene(rng)
        row: dict[str, object]
        row = {"text": document(scene, world)} if rng.random() < DOCUMENT_SHARE else {"messages": conversation(scene, world)}
        key = hashlib.blake2b(json.dumps(row).encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            yield row


def write_shard(output: Path, name: str, seed: str, num_rows: int) -> tuple[int, int, int, int]:
    """Write a pair of files; the numbers of rows and of UTF-8 bytes of text, for documents and conversations."""
    counts = [0, 0, 0, 0]
    paths = [output / f"{kind}.jsonl" if "heldout" not in name else output / f"heldout-{kind}.jsonl" for kind in ("documents", "conversations")]
    if "heldout" not in name:
        paths = [output / f"{kind}-{name}.jsonl" for kind in ("documents", "conversations")]
    with paths[0].open("w", encoding="utf-8") as documents, paths[1].open("w", encoding="utf-8") as conversations:
        for row in rows(seed, num_rows):
            which = int("messages" in row)
            (conversations if which else documents).write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[2 * which] += 1
            counts[2 * which + 1] += len(str(row["text"]).encode()) if not which else sum(len(m["content"]) + 40 for m in row["messages"])  # type: ignore[attr-defined]
    return counts[0], counts[1], counts[2], counts[3]


def write_public_domain(output: Path, books: Sequence[Path], repeats: int, seed: int) -> tuple[int, int]:
    """Write the books' passages ``repeats`` times in shuffled order; every fiftieth passage is held out."""
    texts = [text for book in books for text in passages(book)]
    train = [text for i, text in enumerate(texts) if i % 50]
    order = [text for turn in range(repeats) for text in Random(f"{seed} books {turn}").sample(train, len(train))]
    for name, rows_ in (("documents-books", order), ("heldout-books", [t for i, t in enumerate(texts) if not i % 50])):
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows_)
    return len(order), sum(len(text.encode()) for text in order)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the pre-training corpus of the bundled base model.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "corpus")
    parser.add_argument("--num-shards", type=int, default=22)
    parser.add_argument("--rows-per-shard", type=int, default=18_500)
    parser.add_argument("--public-domain", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--repeats", type=int, default=4, help="times the public-domain passages are repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = [(f"{shard:03d}", f"{options.seed} shard {shard}", options.rows_per_shard) for shard in range(options.num_shards)]
    jobs.append(("heldout", f"{options.seed} heldout", max(options.rows_per_shard // 10, 10)))
    names, seeds, sizes = zip(*jobs, strict=True)
    with ProcessPoolExecutor(options.processes) as pool:
        counts = list(pool.map(partial(write_shard, options.output), names, seeds, sizes))
    totals = [sum(column) for column in zip(*counts, strict=True)]
    print(f"documents      {totals[0]:>9,} rows {totals[1] / 1e6:8.1f} MB\nconversations  {totals[2]:>9,} rows {totals[3] / 1e6:8.1f} MB")
    if options.public_domain:
        num_rows, num_bytes = write_public_domain(options.output, options.public_domain, options.repeats, options.seed)
        print(f"public domain  {num_rows:>9,} rows {num_bytes / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
