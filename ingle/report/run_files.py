"""Files of a finished run: ``report.json`` for programs, ``report.html`` for people, ``answers.jsonl`` for both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingle.atomic import write_atomically
from ingle.config.run import Run
from ingle.errors import CheckpointError
from ingle.report.results import Comparison, RunReport, from_dict, to_dict
from ingle.report.run_page import render_page
from ingle.report.validation import judge_validation

#: Fields of a comparison that the report has as well.
_COPIED = ("metrics", "headline", "verdict", "outcome", "n", "shown", "base_name", "classes")


def write_report(
    folder: Path,
    *,
    run: Run,
    comparisons: Sequence[Comparison],
    summary: Mapping[str, Any],
    metrics_path: Path,
) -> RunReport:
    """Writes the report of a finished run. ``report.json`` comes last, so if it exists, all files are complete.

    Args:
        folder: The run folder.
        run: The resolved config.
        comparisons: Base against tuned model, or all baselines, the strongest first; empty if nothing was evaluated.
        summary: Fields of :class:`RunReport` from ``num_steps`` to ``validation``.
        metrics_path: ``metrics.jsonl`` of the run.

    Returns:
        The content of ``report.json``.
    """
    evaluated: dict[str, Any] = {}
    if comparisons:
        comparison = comparisons[0]
        shown = comparison.shown
        picked = sorted({*shown.gains, *shown.losses, *shown.random, *shown.errors})
        evaluated = {
            **{name: getattr(comparison, name) for name in _COPIED},
            "samples": tuple(replace(comparison.samples[index], index=index) for index in picked),
        }
        if len(comparisons) > 1:
            evaluated["comparisons"] = {each.base_name or "base": replace(each, samples=()) for each in comparisons}
        lines = (json.dumps(to_dict(sample), ensure_ascii=False, allow_nan=False) for sample in comparison.samples)
        write_atomically(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines).encode())
    steps = read_steps(metrics_path)
    if summary.get("validation") is not None:
        summary = {**summary, "validation": judge_validation(summary["validation"], steps)}
    report = RunReport(**summary, run=run.output, model=run.model.id, **evaluated)
    write_atomically(folder / "report.html", render_page(run, report, steps).encode())
    text = json.dumps(to_dict(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "report.json", (text + "\n").encode())
    return report


def read_report(path: Path) -> RunReport:
    """Reads ``report.json``.

    Raises:
        CheckpointError: The file is not a report.
    """
    try:
        return from_dict(RunReport, json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "The report of this run cannot be read.",
            where=str(path),
            why=str(error).splitlines()[0][:200],
            fix="delete the file and run the same command again; it repeats the evaluation, not the training",
        ) from error


def read_steps(metrics_path: Path) -> list[dict[str, Any]]:
    """Returns the figures in ``metrics.jsonl`` by step, those of training and of validation together.

    If a step is repeated (after a crash), the last line counts. Lines that are not steps (left by a crash or an editor)
    are ignored. A step that was only validated has no ``loss``.
    """
    steps: dict[int, dict[str, Any]] = {}
    if not metrics_path.is_file():
        return []
    for line in metrics_path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and _is_number(row["step"]) and _can_be_drawn(row):
            steps[row["step"]] = steps.get(row["step"], {}) | row
    return [steps[step] for step in sorted(steps)]


def _can_be_drawn(row: Mapping[str, Any]) -> bool:
    if "loss" not in row:
        return _is_number(row.get("validation_loss"))
    return _is_number(row["loss"]) and ("lr" not in row or _is_number(row["lr"]))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # not NaN, and no integer beyond the range of floats
