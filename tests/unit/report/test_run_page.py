"""Charts and marks of a run's page."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest

from ingle.config.objective import Classify, ObjectiveKind
from ingle.errors import EvaluationError
from ingle.report import metrics, run_page, training_curves
from ingle.report.charts import Estimate
from ingle.report.metrics import Metric
from ingle.report.results import ValidationPoint, ValidationReport
from ingle.report.run_page import mark_shared
from tests.stored_results import REPORT

ROW = replace(REPORT.metrics["perplexity"], base=4.0, tuned=5.0, delta=1.0, ci95=(0.5, 2.0))


@pytest.mark.parametrize(
    ("higher_is_better", "high", "value", "ends"),
    [
        (True, 10.0, 10.0, (5.0, 20.0)),
        (False, 10.0, -10.0, (-20.0, -5.0)),
        (True, math.inf, 25.0, (12.5, 50.0)),
        (False, math.inf, -25.0, (-50.0, -12.5)),
    ],
    ids=["bounded", "bounded, lower is better", "unbounded", "unbounded, lower is better"],
)
def test_charts_follow_the_range_and_direction_of_a_metric(
    monkeypatch: pytest.MonkeyPatch, higher_is_better: bool, high: float, value: float, ends: tuple[float, float]
) -> None:
    drawn: list[tuple[list[Estimate], str, bool]] = []

    def interval_plot(rows: list[Estimate], *, width: int, unit: str, flipped: bool) -> str:
        drawn.append((rows, unit, flipped))
        return ""

    monkeypatch.setattr(run_page.charts, "interval_plot", interval_plot)
    monkeypatch.setitem(metrics.METRICS, "new", Metric("new", "new", "ratio", "answers", higher_is_better, high))
    run_page._interval_charts({"new": ROW})
    ([estimate], unit, flipped), _ = drawn
    assert (estimate.value, estimate.low, estimate.high) == (value, *ends)
    assert flipped == (not higher_is_better)
    assert ("points" in unit) == math.isfinite(high)


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="There is no metric 'other'"):
        run_page._interval_charts({"other": ROW})


@pytest.mark.parametrize("answer", ["  the cat\n\nsat, on  it ", "cat", "", "   ", "x x x the", "a\u00a0b c"])
def test_marked_runs_are_the_answer(answer: str) -> None:
    assert "".join(text for text, _ in mark_shared(answer, ["The cat sat on it.", "no"])) == answer


def test_a_text_without_any_of_several_labels_has_no_marks() -> None:
    assert mark_shared("sports politics", []) == [("sports politics", False)]


def test_every_objective_has_a_unit_of_its_loss() -> None:
    assert set(get_args(ObjectiveKind)) == run_page._UNITS.keys()
    assert run_page.loss_unit(Classify(kind="classify", problem="regression")) == "mean squared error"
    assert run_page.loss_unit(Classify(kind="classify", problem="multi")) == "nats per label"


def test_marks_are_what_is_shared_with_the_closest_reference() -> None:
    runs = mark_shared("a small cat sat there", ["dogs bark", "The cat sat."])
    assert runs == [("a small ", False), ("cat sat", True), (" ", False), ("there", False)]


def test_a_run_on_preferences_shows_its_loss_and_both_answers() -> None:
    steps = [
        {"step": step, "lr": 1e-3, "loss": 0.6, "rewards/chosen": 1.0 * step, "rewards/rejected": -3.0}
        for step in (1, 2, 3)
    ]
    validation = ValidationReport(
        every=3,
        documents=4,
        groups=2,
        tokens=40,
        best_step=3,
        kept_step=3,
        stopped_early=False,
        history=(ValidationPoint(step=3, loss=0.65),),
    )
    loss, rewards = training_curves.draw("nats per pair", steps, validation)
    assert loss["title"] == "Training loss"
    assert "validation after step 3: 0.650" in loss["wide"]
    assert rewards["names"] == ["chosen", "rejected"]
    assert rewards["wide"].count('class="other"') == 1
    sampled = training_curves.draw("", [row | {"reward": 2.0} for row in steps], validation)[0]
    assert sampled["title"] == "Reward"
    assert "validation after step 3: -0.650" in sampled["wide"]
