"""The sentence on a run's validations."""

from __future__ import annotations

from ingle.report.results import ValidationPoint, ValidationReport
from ingle.report.validation import judge_validation

STEPS = [{"step": step, "loss": 3.0 - 0.1 * step} for step in range(1, 21)]


def _report(
    *losses: float, stderr: float | None = 0.05, kept: int | None = None, early: bool = False
) -> ValidationReport:
    points = [
        ValidationPoint(step=5 * i, loss=loss, rise=loss - min(losses[: i + 1]), rise_stderr=stderr)
        for i, loss in enumerate(losses)
    ]
    best = 5 * losses.index(min(losses))
    return ValidationReport(
        every=5,
        documents=40,
        groups=30,
        tokens=900,
        best_step=best,
        kept_step=best if kept is None else kept,
        stopped_early=early,
        history=tuple(points),
    )


def test_overfitting_is_said_with_its_numbers() -> None:
    found = judge_validation(_report(3.0, 2.5, 2.4, 2.6, 2.9, early=True), STEPS)
    assert found.overfit
    assert found.verdict.startswith("Step 10 was kept: its loss of 2.4000 is the lowest of 5 validations.")
    assert "Step 20 has 2.9000 (+0.5000 ± 0.0500), while the training loss fell from 2.05" in found.verdict
    assert "overfitting." in found.verdict and "Early stopping ended the run after 20 steps." in found.verdict
    assert found.verdict.endswith("only other held-out rows tell how good it is.")


def test_a_small_rise_is_no_overfitting() -> None:
    for stderr in (0.3, None):
        found = judge_validation(_report(3.0, 2.5, 2.6, stderr=stderr), STEPS)
        assert not found.overfit and "no clear difference" in found.verdict


def test_the_last_step_can_be_the_best() -> None:
    found = judge_validation(_report(3.0, 2.5), STEPS)
    assert found.verdict == "Step 5, the last one, was kept: its loss of 2.5000 is the lowest of 2 validations."


def test_without_keep_best_the_better_step_is_named() -> None:
    found = judge_validation(_report(3.0, 2.0, 2.5, kept=10), STEPS)
    assert found.verdict.startswith("Step 10, the last one, was kept; step 5 has the lowest validation loss, 2.0000.")
    assert found.overfit and "optimistic" not in found.verdict
