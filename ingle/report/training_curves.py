"""The curves of a run: its loss over the steps, and what to watch next to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ingle.report import charts
from ingle.report.charts import both_widths
from ingle.report.results import ValidationReport


class _Panel(NamedTuple):
    """What a figure shows.

    Attributes:
        title: Heading.
        unit: Unit of the values.
        key: Its name in ``metrics.jsonl``.
        other: What is drawn next to it.
    """

    title: str
    unit: str
    key: str
    other: str | None = None


#: Of a run that samples answers.
_OF_SAMPLES = (
    _Panel("Reward", "of an answer", "reward"),
    _Panel("Divergence from the reference", "nats per answer", "kl"),
    _Panel("Length of answers", "tokens", "response_tokens"),
    _Panel("Entropy", "nats per token", "entropy"),
)
#: Of a run that learns from preferences, next to its loss.
_OF_PREFERENCES = (
    _Panel("Rewards", "of an answer", "rewards/chosen", "rewards/rejected"),
    _Panel("Margin", "difference of the rewards", "rewards/margin"),
    _Panel("Accuracy", "share of pairs in which the chosen answer has the higher reward", "rewards/accuracy"),
    _Panel("Log-probabilities", "nats per answer", "logps/chosen", "logps/rejected"),
    _Panel("Divergence from the reference", "nats per answer", "kl"),
)


def draw(
    loss_unit: str, steps: Sequence[Mapping[str, Any]], validation: ValidationReport | None
) -> list[dict[str, Any]]:
    """Returns the figures of a run.

    Args:
        loss_unit: What the loss is measured in.
        steps: Lines of ``metrics.jsonl``.
        validation: The validations of the run; of a run that samples answers, their loss is minus the reward.
    """
    panels: Sequence[_Panel] = (_Panel("Training loss", loss_unit, "loss"), *_OF_PREFERENCES)
    if any("reward" in row for row in steps):  # it samples answers: their reward takes the place of the loss
        panels = (*_OF_SAMPLES, *(each for each in _OF_PREFERENCES if each.key != "kl"))
    main, *others = panels
    found = [_figure(main, steps, validation), *(_figure(panel, steps) for panel in others)]
    return [figure for figure in found if figure is not None]


def _figure(
    panel: _Panel, steps: Sequence[Mapping[str, Any]], validation: ValidationReport | None = None
) -> dict[str, Any] | None:
    """Returns a figure over the steps; None if no step has what it shows."""
    keys = [key for key in (panel.key, panel.other) if key is not None]
    rows = [row for row in steps if all(key in row and math.isfinite(row[key]) for key in keys)]
    if not rows:
        return None
    number, values, *others = (
        np.array([row[name] for row in rows], dtype=np.float64) for name in ("step", *keys)
    )  # fmt: skip
    is_main = panel.key in ("loss", "reward")
    lrs = np.array([row["lr"] for row in rows], dtype=np.float64) if is_main and "lr" in rows[0] else None
    span = charts.smoothing_span(len(values))
    sign = -1.0 if panel.key == "reward" else 1.0
    points = None if validation is None else np.array([(each.step, sign * each.loss) for each in validation.history])

    def draw_at(width: int) -> str:
        return charts.loss_curve(
            number,
            values,
            lrs,
            width=width,
            height=300 if width > 500 else 230,
            unit=panel.unit,
            validation=points,
            kept_step=None if validation is None else validation.kept_step,
            name="loss" if panel.key == "loss" else panel.title,
            other=others[0] if others else None,
        )

    return {
        **both_widths(draw_at),
        "title": panel.title,
        "names": [key.partition("/")[2] for key in keys] if others else None,
        "validation": None if validation is None else validation.verdict,
        "first": f"{values[0]:.3f}",
        "last": f"{charts.smooth(values, span)[-1]:.3f}",
        "span": span,
        "num_steps": f"{int(number[-1]):,}",
    }
