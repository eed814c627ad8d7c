"""Charts: scales, ticks, what is drawn where, and markup that is well formed."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ingle.report.charts import (
    MAX_POINTS,
    Estimate,
    both_widths,
    interval_plot,
    loss_curve,
    size_chart,
    smooth,
)
from ingle.report.drawing import nice_ticks, tick_label

AXES = {"titles": ("size", "loss"), "mark": (0.02, "limit"), "width": 880}


def dot(label: str, size: float, value: float, kind: str = "other", spread: float = math.nan) -> Estimate:
    return Estimate(label, value, value - spread, value + spread, kind, f"{label}: {value}", size)


def find(drawn: str, tag: str, style: str | None = None) -> list[dict[str, str]]:
    """The attributes of all elements of a tag and class, in a drawing that must be well-formed XML."""
    found = (element.attrib for element in ElementTree.fromstring(drawn).iter(tag))
    return [element for element in found if style is None or element.get("class") == style]


def test_long_labels_have_room_left_of_the_plot():
    for width in (880, 340):
        drawn = interval_plot([dot("Matthews correlation", 1, 0.2, "better", 0.1)], width=width, unit="points")
        (label,) = find(drawn, "text", "row")
        assert float(label["x"]) >= 7.5 * len("Matthews correlation")  # its end; semi-bold letters of 14 pixels


def test_the_axis_of_a_loss_names_its_unit():
    drawn = loss_curve(np.arange(1.0, 3.0), np.ones(2), None, width=880, unit="nats per masked token")
    assert "loss (nats per masked token)" in drawn


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
    assert smooth(np.array([3.0, 3.0, 3.0]), 5).tolist() == pytest.approx([3.0, 3.0, 3.0])
    assert smooth(np.array([4.0, 0.0]), 3).tolist() == pytest.approx([4.0, 4.0 / 3])


def test_a_long_curve_is_thinned_and_keeps_its_spike():
    losses = np.full(5000, 2.0)
    losses[3210] = 9.0
    drawn = loss_curve(np.arange(1.0, 5001.0), losses, None, width=880)
    (raw,) = find(drawn, "path", "raw")
    places = [float(place.split(",")[1]) for place in raw["d"][1:].split("L")]
    assert len(places) <= MAX_POINTS + 2 and min(places) < min(place for place in places if place != min(places)) - 100
    assert len(drawn) < 60_000


@pytest.mark.parametrize("losses", [[2.5], [2.0, 2.0], [0.0, 0.0, 0.0]])
def test_a_flat_or_single_loss_is_drawn(losses):
    drawn = loss_curve(np.arange(1.0, len(losses) + 1), np.array(losses), np.zeros(len(losses)), width=340)
    assert "nan" not in drawn and "inf" not in drawn
    assert len(find(drawn, "circle", "dot")) == (len(losses) == 1)


def test_every_step_of_a_short_run_is_read_under_the_pointer():
    losses = np.array([3.0, 2.0, 1.0])
    drawn = loss_curve(np.array([1.0, 2.0, 3.0]), losses, losses, width=880)
    assert re.findall(r"step (\d): ([\d.]+)", drawn) == [("1", "3.000"), ("2", "2.000"), ("3", "1.000")]


def test_validations_are_a_second_curve_with_a_ring_around_the_kept_step():
    steps, losses = np.arange(1.0, 5.0), np.array([3.0, 2.5, 2.0, 1.5])
    points = np.array([[0.0, 3.2], [2.0, 2.7], [4.0, 3.0]])
    drawn = loss_curve(steps, losses, None, width=880, validation=points, kept_step=2)
    (curve,) = find(drawn, "path", "validation")
    places = [tuple(map(float, place.split(","))) for place in curve["d"][1:].split("L")]
    (ring,) = find(drawn, "circle", "ring")
    assert (float(ring["cx"]), float(ring["cy"])) == places[1]
    (raw,) = find(drawn, "path", "raw")
    first = float(raw["d"][1:].split(",")[0])
    assert places[0][0] < first < places[1][0], "the first validation comes before the first step"
    assert "validation after step 2: 2.700" in drawn


def test_better_is_to_the_right_of_zero_and_labels_have_the_true_sign():
    rows = [Estimate("up & down", 2.0, 1.0, 3.0, "better", "<note>"), Estimate("none", -1.0, math.nan, 0, "worse", "")]
    for flipped, signs in ((False, {"+", "−"}), (True, {"−", "+"})):
        drawn = interval_plot(rows, width=880, unit="points", flipped=flipped)
        (zero,) = find(drawn, "line", "zero")
        right, left = find(drawn, "circle", "point")
        assert float(left["cx"]) < float(zero["x1"]) < float(right["cx"])
        assert len(find(drawn, "line", "whisker")) == 3
        ticks = [text for text in re.findall(r'middle">([+−][\d.]+)<', drawn)]
        assert {tick[0] for tick in ticks} == signs and ticks[-1][0] == ("−" if flipped else "+")


def test_labels_cover_neither_dots_nor_one_another():
    dots = [dot(f"format-{i}", 3 + 0.02 * i, 0.01 * 1.05**i) for i in range(12)]
    boxes = []
    for x, y, anchor, label in re.findall(
        r'class="name other" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', size_chart(dots, **AXES)
    ):
        width = 7.2 * len(label)
        start = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((start, float(y) - 11, start + width, float(y) + 2))
    assert len(boxes) >= 4
    circles = [
        (float(dot["cx"]) - 5, float(dot["cy"]) - 5, float(dot["cx"]) + 5, float(dot["cy"]) + 5)
        for dot in find(size_chart(dots, **AXES), "circle")
    ]
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :] + circles:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_a_dot_above_the_largest_value_is_an_arrow_at_the_edge():
    drawn = size_chart([dot("near", 1, 0.01, "front", 0.001), dot("far", 2, 50.0, spread=5.0)], y_max=1.0, **AXES)
    assert len(find(drawn, "circle")) == len(find(drawn, "line", "bar")) == len(find(drawn, "path", "dot")) == 1


def test_intervals_and_ticks_fit_into_the_plot():
    dots = [dot("low", 1000.0, 2.0, spread=1.0), dot("high", 1400.0, 5.0, spread=3.0)]
    drawn = size_chart(dots, log=False, log_size=True, **AXES)
    (floor,) = (float(line["y1"]) for line in find(drawn, "line", "zero"))
    for bar in find(drawn, "line", "bar"):
        assert 20 < float(bar["y2"]) < float(bar["y1"]) < floor
    assert len(re.findall(r'text-anchor="middle">[\d,]+<', drawn)) > 2, "a narrow range has round numbers, too"
    wide = size_chart([dot("a", 2e4, 1.0), dot("b", 5e6, 2.0)], log=False, log_size=True, **AXES)
    assert ">100 K<" in wide and ">1 M<" in wide


def test_the_front_descends_in_steps_and_leaves_out_what_loses_more():
    dots = [dot("a", 1, 0.5, "front"), dot("b", 2, 0.6, "front"), dot("c", 3, 0.1, "chosen"), dot("d", 4, 0.01)]
    (steps,) = find(size_chart(dots, **AXES), "path", "steps")
    assert steps["d"].count("M") == 1 and steps["d"].count("H") == steps["d"].count("V") == 1
    assert find(size_chart(dots, has_front=False, **AXES), "path", "steps") == []


@pytest.mark.parametrize("log", [True, False])
def test_a_limit_of_zero_and_a_single_dot_are_drawn(log):
    drawn = size_chart([dot("only", 1, 0.5)], titles=("size", "loss"), mark=(0.0, "limit 0"), width=340, log=log)
    assert "nan" not in drawn and len(find(drawn, "circle")) == 1


def test_text_is_escaped_and_both_widths_are_drawn():
    drawn = both_widths(lambda width: interval_plot([dot("<x>", 1, 1.0, "better")], width=width, unit="a & b"))
    assert [find(drawn[name], "svg")[0]["width"] for name in ("wide", "narrow")] == ["880", "340"]
    assert all("&lt;x&gt;" in svg and "a &amp; b" in svg for svg in drawn.values())
