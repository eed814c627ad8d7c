"""Writes the pre-training corpus of the bundled base model: English text composed by a grammar, from one seed.

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

HELD_OUT = "heldout"
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
        row = (
            {"text": document(scene, world)}
            if rng.random() < DOCUMENT_SHARE
            else {"messages": conversation(scene, world)}
        )
        key = hashlib.blake2b(json.dumps(row).encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            yield row


def write_shard(output: Path, shard: str, seed: str, num_rows: int) -> None:
    """Writes the two files of a shard; ``shard`` is its number or ``heldout``."""
    with (
        shard_path(output, "documents", shard).open("w", encoding="utf-8") as documents,
        shard_path(output, "conversations", shard).open("w", encoding="utf-8") as conversations,
    ):
        for row in rows(seed, num_rows):
            file = conversations if "messages" in row else documents
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def shard_path(output: Path, kind: str, shard: str) -> Path:
    """Where the rows of a kind lie."""
    return output / (f"heldout-{kind}.jsonl" if shard == HELD_OUT else f"{kind}-{shard}.jsonl")


def drop_duplicates(paths: Sequence[Path]) -> tuple[int, int, int]:
    """Rewrites files without rows that an earlier one holds; rows kept, rows dropped, bytes kept."""
    seen: set[bytes] = set()
    num_dropped = num_bytes = 0
    for path in paths:
        lines = path.read_bytes().splitlines(keepends=True)
        kept = []
        for line in lines:
            key = hashlib.blake2b(line, digest_size=10).digest()
            if key not in seen:
                seen.add(key)
                kept.append(line)
        if len(kept) < len(lines):
            path.write_bytes(b"".join(kept))
        num_dropped += len(lines) - len(kept)
        num_bytes += sum(map(len, kept))
    return len(seen), num_dropped, num_bytes


def write_public_domain(output: Path, books: Sequence[Path], repeats: int, seed: int) -> tuple[int, int]:
    """Writes the books' passages ``repeats`` times in shuffled order; every fiftieth passage is held out."""
    texts = [text for book in books for text in passages(book)]
    train = [text for i, text in enumerate(texts) if i % 50]
    order = [text for turn in range(repeats) for text in Random(f"{seed} books {turn}").sample(train, len(train))]
    for name, rows_ in (("documents-books", order), ("heldout-books", [t for i, t in enumerate(texts) if not i % 50])):
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows_)
    return len(order), sum(len(text.encode()) for text in order)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the corpus."""
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
    shards = [*(f"{number:03d}" for number in range(options.num_shards)), HELD_OUT]
    seeds = [
        f"{options.seed} {'shard ' + shard.lstrip('0').zfill(1) if shard != HELD_OUT else shard}" for shard in shards
    ]
    sizes = [options.rows_per_shard] * options.num_shards + [max(options.rows_per_shard // 10, 10)]
    with ProcessPoolExecutor(options.processes) as pool:
        list(pool.map(partial(write_shard, options.output), shards, seeds, sizes))
    for kind in ("documents", "conversations"):
        kept, dropped, size = drop_duplicates([shard_path(options.output, kind, shard) for shard in shards])
        print(f"{kind:14} {kept:>9,} rows {size / 1e6:8.1f} MB   {dropped:,} duplicates dropped")
    if options.public_domain:
        num_rows, num_bytes = write_public_domain(options.output, options.public_domain, options.repeats, options.seed)
        print(f"public domain  {num_rows:>9,} rows {num_bytes / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
