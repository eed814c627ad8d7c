"""Descriptions of metrics, and figures as text."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from ingle.config.evaluate import MetricName
from ingle.errors import EvaluationError
from ingle.report.metrics import METRICS, find_metric
from ingle.report.verdicts import p_relation, p_value


def test_every_metric_of_the_config_is_described() -> None:
    assert set(METRICS) == set(get_args(MetricName))
    assert find_metric("chrf").direction == "higher is better"
    with pytest.raises(EvaluationError, match="meteor"):
        find_metric("meteor")


@pytest.mark.parametrize(
    ("metric", "value", "signed", "text"),
    [
        ("chrf", 61.04, False, "61.0"),
        ("chrf", 48.68, True, "+48.7"),
        ("chrf", -3.26, True, "−3.3"),
        ("chrf", -0.01, True, "0.0"),
        ("exact_match", 0.4123, False, "41.2 %"),
        ("exact_match", 0.5, True, "+50.0 points"),
        ("rouge_l", 0.12345, True, "+0.123"),
        ("perplexity", 123456.7, False, "123,457"),
        ("perplexity", math.inf, False, "∞"),
        ("bleu", -math.inf, True, "−∞"),
        ("bleu", math.nan, False, "–"),
        ("bleu", None, False, "–"),
    ],
)
def test_scores(metric: str, value: float | None, signed: bool, text: str) -> None:
    assert METRICS[metric].format(value, signed=signed) == text


def test_intervals_have_no_unit() -> None:
    assert METRICS["exact_match"].format_interval((0.459, 0.514), signed=True) == "[+45.9, +51.4]"
    assert METRICS["exact_match"].format_interval((0.1, None)) == "[10.0, –]"
    assert METRICS["bleu"].format_interval((-1.0, 1.0), signed=True) == "[−1.0, +1.0]"


def test_a_sample_is_right_or_wrong_or_has_a_score() -> None:
    assert [METRICS["exact_match"].format_sample(value) for value in (1.0, 0.0)] == ["right", "wrong"]
    assert METRICS["rouge_l"].format_sample(0.5) == "0.500"


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
def test_p_values_with_their_relation(p: float, floor: float, text: str) -> None:
    assert p_relation(p, floor=floor) == text


def test_bare_p_values() -> None:
    assert [p_value(p) for p in (0.0123, 1e-20, 0.0, None)] == ["0.012", "1.0e-20", "< 1e-300", "–"]
