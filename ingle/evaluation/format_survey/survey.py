"""Runs a survey of formats: opens the model, measures every format, writes the report and its page.

Every finished format is written to disk at once, so that the same command continues after an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ingle import models
from ingle.atomic import write_atomically
from ingle.config.model import ModelConfig
from ingle.config.model_names import check_name
from ingle.errors import ConfigError, EvaluationError, QuantizationError
from ingle.evaluation.format_survey.candidates import Candidate, find_target, list_candidates, target_names, unquantized
from ingle.evaluation.format_survey.text_windows import count_scored, read_windows
from ingle.evaluation.format_survey.trial import FormatTrial, quality_of
from ingle.evaluation.run.divergence import compare, record_reference
from ingle.evaluation.run.windows import Window
from ingle.events import Progress, Sink, Warned
from ingle.quant.imatrix_collector import linear_maps
from ingle.quant.linear import QuantModule
from ingle.report.format_advice import LIMIT, NUM_TOKENS, check_advice, pareto_front, recommend, warnings
from ingle.report.format_page import render_format_page
from ingle.report.format_results import FormatReport, FormatResult, Skipped, Subject

#: Version of the JSON and of how its figures are computed.
SCHEMA = 1

#: Number of values at either end of a tensor that identify it.
_NUM_END_VALUES = 2048


@dataclass(frozen=True, slots=True)
class SurveyRequest:
    """The model, text and formats to compare.

    Attributes:
        model: Config of the model; ``id`` is a folder or hub id.
        data: Text to measure on: a file, glob or hub dataset.
        names: Names of formats; all if empty.
        num_tokens: Number of tokens of the text that are scored.
        limit: Largest divergence of the recommended format, in nats per token.
        imatrix: An importance matrix to quantize with.
        out: Folder for ``formats.json`` and ``formats.html``; None writes nothing.
    """

    model: ModelConfig
    data: str
    names: Sequence[str] = ()
    num_tokens: int = NUM_TOKENS
    limit: float = LIMIT
    imatrix: Path | None = None
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """The content of ``formats.json`` that a survey continues from."""

    subject: Subject
    formats: list[FormatResult]
    status: str = "unfinished"


def survey(request: SurveyRequest, sink: Sink = lambda event: None) -> FormatReport:
    """Compares formats on a model and a text.

    Args:
        request: Model, text and formats.
        sink: Receives the progress, and a warning for each format that cannot store this model.

    Returns:
        The report. With ``out``, it is also written as ``formats.json`` and ``formats.html``.

    Raises:
        ConfigError: A format is unknown, or the folder contains other files.
        ModelError: The model cannot be read.
        DataError: The text cannot be read.
        EvaluationError: The model is already quantized or has fused experts, or the folder contains another comparison.
    """
    _check(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = models.load_tokenizer(request.model)
    model = models.load_model(request.model, device=device, sink=sink)
    _require_unquantized(model, request.model.id)
    windows = read_windows(request.data, model, tokenizer, request.num_tokens)
    importance = None if request.imatrix is None else models.load_importance(model, request.imatrix, sink)
    maps = [f"{name}.weight" for name in linear_maps(model)]
    names = request.names or target_names()
    candidates, left_out = list_candidates(model, maps, names, has_imatrix=importance is not None)
    if left_out:
        sink(
            Warned(
                f"Skipping the GGUF file types: llama.cpp's names for the weights of a "
                f"{model.config.model_type} model are unknown.",
                count=len(left_out),
            )
        )
    imatrix = None if request.imatrix is None else str(request.imatrix)
    dtype = str(model.dtype).removeprefix("torch.")
    subject = Subject(request.model.id, request.data, imatrix, dtype, _fingerprint(model, windows, importance))
    results = {} if request.out is None else _read_results(request.out, subject)

    def keep(result: FormatResult) -> None:
        results[result.name] = result
        if request.out is not None:
            content = asdict(_Unfinished(subject, list(results.values())))
            write_atomically(request.out / "formats.json", json.dumps(content).encode())

    missing = [each for each in (unquantized(model), *candidates) if each.name not in results]
    skipped = _measure(model, windows, missing, importance, keep, sink)
    found = [results[candidate.name] for candidate in candidates if candidate.name in results]
    report = _make_report(subject, windows, results["none"], found, skipped, request.limit)
    for message in report.warnings:
        sink(Warned(message))
    if request.out is not None:
        write_atomically(request.out / "formats.html", render_format_page(report).encode())
        content = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
        write_atomically(request.out / "formats.json", content.encode())
    return report


def _check(request: SurveyRequest) -> None:
    """Checks the names and the output folder before anything is loaded."""
    for name in request.names:
        find_target(name, "--formats")
    check_name(request.model.id)
    out = request.out
    if out is None or not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "formats.json").is_file()):
        raise ConfigError(
            f"{out} contains other files." if out.is_dir() else f"{out} is a file.",
            where=f"--out {out}",
            fix="name a new folder",
        )


def _read_results(folder: Path, subject: Subject) -> dict[str, FormatResult]:
    """Returns the results of this subject that are in the folder; creates the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "formats.json"
    if not path.exists():
        return {}
    try:
        saved = TypeAdapter(_Unfinished).validate_json(path.read_bytes())
    except ValueError:
        raise EvaluationError(
            f"{path.name} does not contain a comparison of formats.",
            where=str(path),
            fix="name another folder with --out",
        ) from None
    if saved.subject.fingerprint != subject.fingerprint:
        raise EvaluationError(
            "The folder contains a comparison of another model, text or version.",
            where=str(folder),
            fix="name another folder with --out, or delete this one",
        )
    return {row.name: row for row in saved.formats}


def _measure(
    model: Any,
    windows: Sequence[Window],
    candidates: Sequence[Candidate],
    importance: Mapping[str, Tensor] | None,
    keep: Callable[[FormatResult], None],
    sink: Sink,
) -> list[Skipped]:
    """Measures every candidate and passes the result to ``keep``; returns those that cannot store the model."""

    def to_sink(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: sink(Progress(stage, done, total))

    trial = FormatTrial(model)
    reference = record_reference(model, windows, to_sink("Predicting with the unquantized model"))
    skipped = []
    for number, candidate in enumerate(candidates, 1):
        name = candidate.name if candidate.formats else "the unquantized model"
        stage = f"{name} ({number} of {len(candidates)})"
        try:
            with trial.quantized(candidate.formats, importance, to_sink(f"Quantizing to {stage}")) as cost:
                predictions = compare(model, reference, windows, to_sink(f"Measuring {stage}"))
        except QuantizationError as error:
            why = error.why or error.message
            skipped.append(Skipped(candidate.name, why))
            sink(Warned(f"{candidate.name} cannot store this model: {why.rstrip('.')}.", where=error.where))
            continue
        result = FormatResult(
            name=candidate.name,
            container=candidate.container,
            types=dict(candidate.types),
            size_bytes=candidate.size_bytes,
            bits_per_weight=8 * candidate.size_bytes / sum(candidate.types.values()),
            **asdict(cost),
            quality=quality_of(predictions),
        )
        keep(result)
    return skipped


def _make_report(
    subject: Subject,
    windows: Sequence[Window],
    reference: FormatResult,
    found: Sequence[FormatResult],
    skipped: Sequence[Skipped],
    limit: float,
) -> FormatReport:
    rows = sorted(found, key=lambda row: (row.size_bytes, row.name))
    num_tokens = sum(map(count_scored, windows))
    return FormatReport(
        schema=SCHEMA,
        status="finished",
        subject=subject,
        num_tokens=num_tokens,
        num_windows=len(windows),
        limit=limit,
        reference=reference,
        formats=tuple(rows),
        front=tuple(pareto_front(rows)),
        recommendation=recommend(rows, limit),
        sayings=tuple(check_advice(rows, limit)),
        skipped=tuple(skipped),
        warnings=tuple(warnings(num_tokens, len(windows))),
    )


def _require_unquantized(model: Any, name: str) -> None:
    found = next((module for module in model.modules() if isinstance(module, QuantModule)), None)
    if found is not None:
        raise EvaluationError(
            f"The weights of {name} are already quantized to {found.format.name}.",
            where="MODEL",
            why="the loss of another format can only be measured against the unquantized weights",
            fix="name the model's 16-bit release",
        )


def _fingerprint(model: Any, windows: Sequence[Window], importance: Mapping[str, Tensor] | None) -> str:
    """Returns a hash of the weights (the ends of each), the text, the importance matrix, the dtype and the schema."""
    digest = hashlib.sha256(f"{SCHEMA} {model.dtype}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        for end in (flat[:_NUM_END_VALUES], flat[-_NUM_END_VALUES:]):
            digest.update(end.float().cpu().numpy().tobytes())
    for window in windows:
        digest.update(window.sample.input_ids.tobytes() + window.sample.labels.tobytes())
    for name, values in (importance or {}).items():
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
