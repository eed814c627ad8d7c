"""What the validations of a run say: which step was kept and why, and whether the run overfitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from ingle.report.results import ValidationPoint, ValidationReport
from ingle.wording import plural

#: The last loss is higher than the lowest if they differ by more than this many standard errors.
_STDERRS = 2.0


def judge_validation(found: ValidationReport, steps: Sequence[Mapping[str, Any]]) -> ValidationReport:
    """Returns the validations with their verdict.

    Args:
        found: The validations.
        steps: Figures of all steps, as :func:`~ingle.report.run_files.read_steps` returns them.
    """
    best = next(point for point in found.history if point.step == found.best_step)
    last = found.history[-1]
    overfit = last.rise_stderr is not None and last.rise > _STDERRS * last.rise_stderr
    sentences = [_kept(found, best, last)]
    if last.step != best.step:
        sentences.append(_compare(best, last, overfit, _mean_losses(steps, (best.step, last.step))))
    if found.stopped_early:
        sentences.append(f"Early stopping ended the run after {plural(last.step, 'step')}.")
    if found.kept_step == best.step != last.step:
        sentences.append("The lowest of several losses is optimistic; only other held-out rows tell how good it is.")
    return replace(found, overfit=overfit, verdict=" ".join(sentences))


def _kept(found: ValidationReport, best: ValidationPoint, last: ValidationPoint) -> str:
    if found.kept_step == best.step:
        where = ", the last one," if found.kept_step == last.step else ""
        validations = plural(len(found.history), "validation")
        return f"Step {found.kept_step:,}{where} was kept: its loss of {best.loss:.4f} is the lowest of {validations}."
    lowest = f"step {best.step:,} has the lowest validation loss, {best.loss:.4f}"
    return f"Step {found.kept_step:,}, the last one, was kept; {lowest}."


def _compare(best: ValidationPoint, last: ValidationPoint, overfit: bool, training: tuple[float, float] | None) -> str:
    """Returns how the last validation differs from the best one."""
    error = "" if last.rise_stderr is None else f" ± {last.rise_stderr:.4f}"
    sentence = f"Step {last.step:,} has {last.loss:.4f} ({last.rise:+.4f}{error})"
    if not overfit:
        return f"{sentence}, which is no clear difference."
    if training is None or training[1] >= training[0]:
        return f"{sentence}: the model got worse."
    return f"{sentence}, while the training loss fell from {training[0]:.4f} to {training[1]:.4f}: overfitting."


def _mean_losses(steps: Sequence[Mapping[str, Any]], ends: tuple[int, int]) -> tuple[float, float] | None:
    """Returns the mean training loss of the steps that lead to each of two steps; None without such steps."""
    width = max(1, (ends[1] - ends[0]) // 4)
    means = []
    for end in ends:
        near = [row for row in steps if "loss" in row and end - width < row["step"] <= max(end, width)]
        losses = [-row["reward"] if "reward" in row else row["loss"] for row in near]
        if not losses:
            return None
        means.append(fmean(losses))
    return means[0], means[1]
