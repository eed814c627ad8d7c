"""The report of a run: ``report.json`` for programs, ``report.html`` for people, ``answers.jsonl`` for both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingle.atomic import write_atomically
from ingle.config.run import Run
from ingle.evaluation.page import render_page


def write_report(
    folder: Path, *, run: Run, evaluation: Mapping[str, Any] | None, summary: Mapping[str, Any], metrics_path: Path
) -> dict[str, Any]:
    """Writes the report of a finished run; ``report.json`` comes last, so its presence means all of it is there.

    Args:
        folder: The run folder.
        run: The resolved config.
        evaluation: What :func:`ingle.evaluation.compare` returned; None when nothing was evaluated.
        summary: What the run took: ``num_steps, num_tokens, tokens_per_s, train_s, wall_s, peak_memory_bytes``,
            and ``plan`` and ``audit`` as the run announced them.
        metrics_path: ``metrics.jsonl`` of the run.

    Returns:
        The content of ``report.json``.
    """
    report: dict[str, Any] = {"status": "finished", "metrics": {}, **summary, "run": run.output, "model": run.model.id}
    if evaluation is not None:
        picked = sorted({index for indices in evaluation["shown"].values() for index in indices})
        report |= {key: evaluation[key] for key in ("metrics", "headline", "verdict", "outcome", "n", "shown")}
        report["samples"] = [{"index": index, **evaluation["samples"][index]} for index in picked]
        lines = (json.dumps(sample, ensure_ascii=False, allow_nan=False) for sample in evaluation["samples"])
        write_atomically(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines).encode())
    page = render_page(run, report, read_steps(metrics_path))
    write_atomically(folder / "report.html", page.encode())
    write_atomically(
        folder / "report.json", (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )
    return report


def read_steps(metrics_path: Path) -> list[dict[str, Any]]:
    """The steps of ``metrics.jsonl`` in order; of a step made twice (after a crash) the last one counts.

    Lines that hold no step, as a crash or an editor may leave them, are passed over.
    """
    steps: dict[int, dict[str, Any]] = {}
    if not metrics_path.is_file():
        return []
    for line in metrics_path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and _is_number(row["step"]) and _has_numbers(row):
            steps[row["step"]] = row
    return [steps[step] for step in sorted(steps)]


def _has_numbers(row: Mapping[str, Any]) -> bool:
    """Whether what is drawn of a step can be drawn."""
    return _is_number(row.get("loss")) and ("lr" not in row or _is_number(row["lr"]))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # not NaN, and no whole number that no float holds
