"""Figures in words."""

from __future__ import annotations

import pytest

from ingle.evaluation.wording import p_value, score


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
