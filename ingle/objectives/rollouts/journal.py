"""The journal of an iteration: finished answers and their scores, so that a killed run does not sample them again.

A file of JSON lines, to which every line is appended by one write. Its first line says which weights and options the
answers were sampled with; a file of others is ignored. What a crash has cut off is ignored, too: since tokens follow
from counters, what is missing is sampled again and comes out the same.

Legend: T tokens of an answer, G answers to a prompt, F rewards.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingle.atomic import disk_full_explained, write_atomically
from ingle.models import Rollout
from ingle.rewards import Scores

_FORMAT = 1
#: Seconds between two calls that force lines to the disk.
_SYNC_S = 1.0


class Journal:
    """The journal of one iteration; each rank appends to a file of its own, and reads those of all.

    Args:
        folder: Where the journals of a run are; it need not exist.
        iteration: The iteration, from 0.
        origin: What the answers depend on, as plain values.
        rank: This rank.

    Attributes:
        rollouts: Finished answers, by draw and answer.
        scores: Scores of the answers to a prompt, by draw.
    """

    def __init__(self, folder: Path, iteration: int, origin: Mapping[str, Any], rank: int = 0) -> None:
        self._path = folder / f"iteration-{iteration:06d}-rank-{rank:05d}.jsonl"
        self._header = {"format": _FORMAT, "iteration": iteration, **origin}
        self.rollouts: dict[tuple[int, int], Rollout] = {}
        self.scores: dict[int, Scores] = {}
        self._synced, self._begun = time.monotonic(), False
        for path in sorted(folder.glob(f"iteration-{iteration:06d}-rank-*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        lines = _lines(path)
        if next(lines, None) != self._header:
            return
        for line in lines:
            if "ids" in line:
                rollout = _rollout(line)
                self.rollouts[rollout.draw, rollout.answer] = rollout
            else:
                self.scores[int(line["draw"])] = _scores(line)

    def add_rollout(self, rollout: Rollout) -> None:
        """Appends a finished answer."""
        self.rollouts[rollout.draw, rollout.answer] = rollout
        floats = {name: _packed(getattr(rollout, name)) for name in ("logps", "entropies")}
        own = {"draw": rollout.draw, "answer": rollout.answer, "status": rollout.status}
        self._append({**own, "ids": rollout.ids.tolist(), **floats})

    def add_scores(self, draw: int, scores: Scores) -> None:
        """Appends the scores of the answers to a prompt."""
        self.scores[draw] = scores
        values = [[None if np.isnan(value) else float(value) for value in row] for row in scores.values]
        statuses = [list(row) for row in scores.statuses]
        self._append({"draw": draw, "scores": values, "statuses": statuses, "metrics": dict(scores.metrics)})

    def _append(self, line: Mapping[str, Any]) -> None:
        with disk_full_explained(self._path):
            if not self._begun:
                self._begin()
            with self._path.open("ab") as file:
                file.write(_written(line))
                if time.monotonic() - self._synced > _SYNC_S:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()

    def _begin(self) -> None:
        """Keeps the lines of this rank's file that are whole, or begins it anew."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_lines(self._path))
        kept = lines if lines[:1] == [self._header] else [self._header]
        write_atomically(self._path, b"".join(map(_written, kept)))
        self._begun = True


def delete_journals(folder: Path, before: int) -> None:
    """Deletes the journals of all iterations before ``before``."""
    for path in folder.glob("iteration-*.jsonl"):
        match = re.match(r"iteration-(\d+)-", path.name)
        if match is not None and int(match[1]) < before:
            path.unlink(missing_ok=True)


def _written(line: Mapping[str, Any]) -> bytes:
    text = json.dumps(line, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file up to the first that is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.split(b"\n")[:-1]:  # what follows the last line break was cut off
        checksum, _, text = line.partition(b" ")
        if checksum != f"{zlib.crc32(text):08x}".encode():
            return
        yield json.loads(text)


def _packed(values: Any) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def _unpacked(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)


def _rollout(line: Mapping[str, Any]) -> Rollout:
    logps, entropies = (_unpacked(line[name]) for name in ("logps", "entropies"))
    return Rollout(line["draw"], line["answer"], np.array(line["ids"], np.int32), logps, entropies, line["status"])


def _scores(line: Mapping[str, Any]) -> Scores:
    rows: Sequence[Sequence[float | None]] = line["scores"]
    values = np.array([[np.nan if value is None else value for value in row] for row in rows], np.float64)
    return Scores(values, tuple(tuple(row) for row in line["statuses"]), metrics=line["metrics"])
