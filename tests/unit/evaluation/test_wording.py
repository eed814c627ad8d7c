"""Figures in words."""

from __future__ import annotations

import pytest

from ingle.report.charts import nice_ticks, smooth, tick_label
from ingle.report.verdicts import p_value, score


@pytest.mark.parametrize(
    ("p", "floor", "text"),
    [
        (0.0309, 0, "p = 0.031"),
        (1.0, 0, "p = 1"),
        (4e-18, 0, "p = 4.0 × 10⁻¹⁸"),
        (2.3e-308, 0, "p < 10⁻³⁰⁰"),
        (1 / 10_001, 1 / 10_001, "p ≤ 0.0001"),
        (2 / 10_001, 1 / 10_001, "p = 2.0 × 10⁻⁴"),
        (0.2, 1 / 10_001, "p = 0.200"),
    ],
)
def test_p_values(p, floor, text):
    assert p_value(p, floor=floor) == text


@pytest.mark.parametrize(
    ("metric", "value", "signed", "text"),
    [
        ("chrf", 61.04, False, "61.0"),
        ("chrf", -3.26, True, "−3.3"),
        ("chrf", -0.01, True, "0.0"),
        ("exact_match", 0.4123, False, "41.2 %"),
        ("exact_match", 0.5, True, "+50.0 points"),
        ("rouge_l", 0.12345, True, "+0.123"),
        ("perplexity", 123456.7, False, "123,457"),
        ("bleu", None, False, "–"),
    ],
)
def test_scores(metric, value, signed, text):
    assert score(metric, value, signed=signed) == text


def test_ticks_are_round_and_inside():
    assert nice_ticks(0.0, 4.2, 5) == [0, 1, 2, 3, 4]
    assert nice_ticks(-0.013, 0.027, 4) == pytest.approx([-0.01, 0.0, 0.01, 0.02])
    for low, high in ((0.0, 1e-9), (3.1, 3.2), (-1e6, 1e6)):
        ticks = nice_ticks(low, high, 5)
        assert 3 <= len(ticks) <= 12 and all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_tick_labels():
    assert [tick_label(value, 0.25) for value in (0, 0.25, -0.5)] == ["0", "0.25", "−0.50"]
    assert tick_label(2000, 1000) == "2,000"


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    import numpy as np

    assert smooth(np.array([3.0, 3.0, 3.0]), 5).tolist() == pytest.approx([3.0, 3.0, 3.0])
    assert smooth(np.array([4.0, 0.0]), 3).tolist() == pytest.approx([4.0, 4.0 / 3])
