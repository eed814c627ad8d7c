"""Estimates the size of training data from its files, without a tokenizer: in milliseconds, whatever their size."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

from ingle.config.data import SUFFIXES, TAGGED_SUFFIXES, Source
from ingle.config.objective import rows_of
from ingle.config.paths import find_path
from ingle.config.policy import Sampled
from ingle.config.run import Run
from ingle.planning.rollouts import sampled_shape
from ingle.planning.shape import DataShape

#: Bytes of a file that are read to estimate the whole.
_SAMPLE_BYTES = 4 << 20
#: Bytes of text per token of English with a vocabulary of 32,000 to 256,000, quotes and keys of rows included.
_BYTES_PER_TOKEN = 4.5
_GZIP_RATIO = 3.5
#: What is assumed where nothing can be read.
ASSUMED_ROWS, ASSUMED_TOKENS = 10_000, 512
#: Share of a packed sequence that documents fill.
_FILLED = 0.97


@dataclass(frozen=True, slots=True)
class _Found:
    rows: float
    tokens: float
    longest: float


def estimate_data(run: Run) -> tuple[DataShape, list[str]]:
    """Returns the shape of a run's data, and notes that say how it is known.

    Args:
        run: The run; its relative paths start from the current folder or from ``run.paths_from``.
    """
    notes: list[str] = []
    rows, tokens, longest = _estimate_all(run.data.sources, run.paths_from, notes)
    validation = run.data.validation
    validation_tokens = 0.0
    if validation is not None and validation.share is not None:
        validation_tokens = tokens * validation.share
        rows, tokens = rows * (1 - validation.share), tokens * (1 - validation.share)
    elif validation is not None:
        validation_tokens = _estimate_all(validation.sources, run.paths_from, notes)[1]
    objective = rows_of(run.objective)
    if isinstance(objective, Sampled):
        return _prompts(run, objective, rows, tokens / max(1.0, rows), longest, round(validation_tokens)), notes
    return replace(_shape(run, rows, tokens, longest), validation_tokens=round(validation_tokens)), notes


def _prompts(
    run: Run, objective: Sampled, rows: float, mean: float, longest: float, validation_tokens: int
) -> DataShape:
    """Returns the shape of answers to prompts that are as long as the rows, which may have answers of their own."""
    most = objective.rollout.max_new_tokens
    room = max(1, run.data.max_seq_len - most)
    return sampled_shape(
        objective,
        max(1, round(rows)),
        min(mean, room),
        math.ceil(min(longest, room)),
        shares=True,
        validation_tokens=round(validation_tokens * (1 + most / max(1.0, mean))),
    )


def _estimate_all(sources: Sequence[Source], paths_from: str | None, notes: list[str]) -> tuple[float, float, float]:
    """Returns the rows and tokens of all sources and the tokens of the longest row; adds to the notes."""
    parts = []
    for source in sources:
        found = _estimate(source, paths_from)
        if found is None:
            found = _Found(ASSUMED_ROWS, ASSUMED_ROWS * ASSUMED_TOKENS, ASSUMED_TOKENS)
            if source.limit is not None:
                found = _Found(source.limit, source.limit * ASSUMED_TOKENS, ASSUMED_TOKENS)
            notes.append(
                f"{source.path} cannot be read here: {found.rows:,.0f} rows of {ASSUMED_TOKENS} tokens assumed."
            )
        else:
            notes.append(
                f"{source.path}: about {found.rows:,.0f} rows and {found.tokens:,.0f} tokens, estimated from its size."
            )
        parts.append(found)
    return sum(part.rows for part in parts), sum(part.tokens for part in parts), max(part.longest for part in parts)


def _shape(run: Run, rows: float, tokens_found: float, longest: float) -> DataShape:
    """Returns the shape of rows after truncation and packing."""
    limit = run.data.max_seq_len
    mean = tokens_found / max(1.0, rows)
    longest = min(longest, limit)
    mean = min(mean, longest) if run.data.too_long != "split" else mean
    tokens = max(1, round(rows * mean))
    document = min(mean, limit)
    if not run.data.packing:
        return DataShape(max(1, round(rows)), tokens, math.ceil(longest), math.ceil(longest), document)
    sequences = max(1, math.ceil(tokens / (limit * _FILLED)))
    return DataShape(sequences, tokens, min(limit, tokens), math.ceil(longest), document)


def _estimate(source: Source, paths_from: str | None) -> _Found | None:
    """Returns what the files of a source contain; None if there are none."""
    path = find_path(source.path, paths_from)
    files = [Path(name) for name in sorted(glob(str(Path(path).expanduser()), recursive=True))]
    files = [file for file in files if file.is_file()]
    known = (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES))
    if not files or not (source.lines or any(file.name.lower().endswith(known) for file in files)):
        return None
    try:
        parts = [_estimate_file(file) for file in files]
    except (OSError, ValueError, ImportError):
        return None
    rows = sum(part.rows for part in parts)
    tokens = sum(part.tokens for part in parts)
    if source.limit is not None and rows > source.limit:
        rows, tokens = source.limit, tokens * source.limit / rows
    return _Found(rows, tokens, max(part.longest for part in parts)) if rows else None


def _estimate_file(path: Path) -> _Found:
    name = path.name.lower()
    if name.endswith(".parquet"):
        from pyarrow import parquet

        metadata = parquet.ParquetFile(path).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        tokens = sum(group.total_byte_size for group in groups) / _BYTES_PER_TOKEN
        return _Found(metadata.num_rows, tokens, 4 * tokens / max(1, metadata.num_rows))
    size = path.stat().st_size
    if name.endswith(".gz"):
        size = round(size * _GZIP_RATIO)
        with gzip.open(path, "rb") as file:
            sample = file.read(_SAMPLE_BYTES)
        size = len(sample) if len(sample) < _SAMPLE_BYTES else max(size, len(sample))
    else:
        with path.open("rb") as file:
            sample = file.read(_SAMPLE_BYTES)
    if name.removesuffix(".gz").endswith(".json") and len(sample) < _SAMPLE_BYTES:
        rows = json.loads(sample)
        lines = [json.dumps(row).encode() for row in rows] if isinstance(rows, list) else [sample]
    elif name.removesuffix(".gz").endswith(TAGGED_SUFFIXES):
        lines = [block for block in re.split(rb"\r?\n\s*\n", sample) if block.strip()]
    else:
        lines = [line for line in sample.splitlines() if line.strip()]
    if not lines:
        return _Found(0, 0, 0)
    share = size / max(1, len(sample))
    tokens = sum(map(len, lines)) / _BYTES_PER_TOKEN
    return _Found(len(lines) * share, tokens * share, max(map(len, lines)) / _BYTES_PER_TOKEN)
