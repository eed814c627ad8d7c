"""Every format on one model and one text: the loop, and what comes out of it.

A format that is done is written down at once, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ingle.atomic import write_atomically
from ingle.errors import EvaluationError, QuantizationError
from ingle.evaluation.formats.bench import Bench
from ingle.evaluation.formats.candidates import Candidate
from ingle.evaluation.formats.choice import LIMIT, pareto_front, recommend, sayings, warnings
from ingle.evaluation.formats.result import FormatResult, Quality
from ingle.evaluation.formats.text import count_scored
from ingle.evaluation.run.divergence import Reference, compare, record_reference
from ingle.evaluation.run.windows import Window
from ingle.events import Progress, Sink, Warned

#: Of the JSON and of how its figures come about.
SCHEMA = 1

#: What the unpacked model is called.
REFERENCE = "none"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is compared on what.

    Attributes:
        model: Id or folder.
        data: The file.
        imatrix: The importance matrix, if one was used.
        dtype: Compute type.
        fingerprint: Of all that decides the figures.
    """

    model: str
    data: str
    imatrix: str | None
    dtype: str
    fingerprint: str


class Notebook:
    """Rows that are done, on disk where a folder is given.

    Args:
        path: ``formats.json``; None keeps them in memory only.
        subject: Rows of another subject are refused.

    Raises:
        EvaluationError: The file holds another comparison.
    """

    def __init__(self, path: Path | None, subject: Subject) -> None:
        self._path = path
        self._subject = subject
        self.rows: dict[str, FormatResult] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, row: FormatResult) -> None:
        """Takes a row and writes it down."""
        self.rows[row.name] = row
        if self._path is not None:
            rows = [each.to_dict() for each in self.rows.values()]
            content = {"status": "unfinished", "subject": asdict(self._subject), "formats": rows}
            write_atomically(self._path, json.dumps(content).encode())

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_bytes())
            fingerprint = content["subject"]["fingerprint"]
            rows = [FormatResult.from_dict(row) for row in content["formats"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path.name} holds no comparison of formats.",
                where=str(path),
                why=str(error),
                fix="name another --out",
            ) from None
        if fingerprint != self._subject.fingerprint:
            raise EvaluationError(
                "The folder holds a comparison of another model, text or version.",
                where=str(path.parent),
                fix="name another --out, or delete the folder",
            )
        self.rows = {row.name: row for row in rows}


def compare_formats(
    model: Any,
    windows: Sequence[Window],
    candidates: Sequence[Candidate],
    subject: Subject,
    *,
    importance: Mapping[str, Tensor] | None = None,
    notebook: Notebook,
    limit: float = LIMIT,
    sink: Sink = lambda event: None,
) -> dict[str, Any]:
    """Measures every candidate against the unpacked model.

    Args:
        model: In evaluation mode, weights in the compute type; it is as before when this returns.
        windows: Of the text.
        candidates: Formats.
        subject: What the figures belong to.
        importance: For formats that weigh their error by it, by parameter.
        notebook: Rows that are done.
        limit: Nats a token that the recommended format may cost.
        sink: Gets the progress, and a warning for each format that cannot hold this model.

    Returns:
        Plain data: ``schema, status, subject, num_tokens, num_windows, limit, reference, formats`` (smallest first),
        ``front, recommendation, sayings, skipped, warnings``.
    """
    bench = Bench(model)
    reference = record_reference(model, windows, _teller(sink, "reading the text, unpacked"))
    skipped = []
    done = notebook.rows
    if REFERENCE not in done:
        quality = Quality.of(compare(model, reference, windows, _teller(sink, "predicting, unpacked")))
        notebook.add(_row(Candidate.unpacked(model), 0.0, _model_bytes(model), None, quality))
    for number, candidate in enumerate(candidates, 1):
        if candidate.name in done:
            continue
        stage = f"{candidate.name} ({number} of {len(candidates)})"
        try:
            row = _measure(model, bench, candidate, windows, reference, importance, _stages(sink, stage))
        except QuantizationError as error:
            skipped.append({"name": candidate.name, "why": error.why or error.message})
            sink(Warned(f"{candidate.name} cannot hold this model: {error.why or error.message}", where=error.where))
            continue
        notebook.add(row)
    num_tokens = sum(count_scored(window) for window in windows)
    doubts = warnings(num_tokens, len(windows))
    for doubt in doubts:
        sink(Warned(doubt))
    wanted = {candidate.name for candidate in candidates}
    rows = sorted((row for row in done.values() if row.name in wanted), key=lambda row: (row.size_bytes, row.name))
    return {
        "schema": SCHEMA,
        "status": "finished",
        "subject": asdict(subject),
        "num_tokens": num_tokens,
        "num_windows": len(windows),
        "limit": limit,
        "reference": done[REFERENCE].to_dict(),
        "formats": [row.to_dict() for row in rows],
        "front": pareto_front(rows),
        "recommendation": asdict(recommend(rows, limit)),
        "sayings": [asdict(saying) for saying in sayings(rows, limit)],
        "skipped": skipped,
        "warnings": doubts,
    }


def _measure(
    model: Any,
    bench: Bench,
    candidate: Candidate,
    windows: Sequence[Window],
    reference: Reference,
    importance: Mapping[str, Tensor] | None,
    tell: tuple[Callable[[int, int], None], Callable[[int, int], None]],
) -> FormatResult:
    with bench.holding(candidate.formats, importance, tell[0]) as held:
        predictions = compare(model, reference, windows, tell[1])
    return _row(candidate, held.encode_s, held.memory_bytes, held.decode_weights_per_s, Quality.of(predictions))


def _row(candidate: Candidate, encode_s: float, memory: int, rate: float | None, quality: Quality) -> FormatResult:
    return FormatResult(
        name=candidate.name,
        container=candidate.container,
        types=dict(candidate.types),
        size_bytes=candidate.size_bytes,
        bits_per_weight=8 * candidate.size_bytes / sum(candidate.types.values()),
        memory_bytes=memory,
        decode_weights_per_s=rate,
        encode_s=encode_s,
        quality=quality,
    )


def _model_bytes(model: Any) -> int:
    return sum(int(parameter.nbytes) for parameter in model.parameters())


def _teller(sink: Sink, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: sink(Progress(stage, done, total))


def _stages(sink: Sink, name: str) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    return _teller(sink, f"{name}: packing"), _teller(sink, f"{name}: predicting")
