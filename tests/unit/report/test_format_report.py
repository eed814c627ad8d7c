"""What a format survey reports: the front, the recommendation, common advice, the page and the terminal table."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ingle.cli.formats import _render
from ingle.report.format_advice import check_advice, pareto_front, recommend, warnings
from ingle.report.format_page import render_format_page
from ingle.report.format_results import Figure, FormatReport, FormatResult, Quality, Subject


def row(name: str, size: int, kl: float, loss: float | None = None, spread: float = 0.0) -> FormatResult:
    figure = Figure(kl, kl - spread, kl + spread)
    rise = Figure(kl if loss is None else loss, None, None)
    quality = Quality(Figure(5.0, 4.9, 5.1), rise, figure, 5 * kl, Figure(0.9, 0.88, 0.92))
    return FormatResult(name, "gguf", {name: 100}, size, size * 8 / 100, 2 * size, 1e9, 0.5, quality)


def report_of(rows: list[FormatResult], limit: float = 0.02) -> FormatReport:
    return FormatReport(
        schema=1,
        status="finished",
        subject=Subject("models/my model", "held-out.jsonl", None, "bfloat16", "0"),
        num_tokens=10_602,
        num_windows=1,
        limit=limit,
        reference=row("none", 200, 0.0),
        formats=tuple(rows),
        front=tuple(pareto_front(rows)),
        recommendation=recommend(rows, limit),
        sayings=tuple(check_advice(rows, limit)),
        skipped=(),
        warnings=tuple(warnings(10_602, 1)),
    )


ROWS = [
    row("q8_0", 110, 0.001),
    row("q4_0", 60, 0.05),
    row("q4_k_m", 62, 0.012),
    row("q4_k_s", 59, 0.03),
    row("nf4", 70, 0.04),
]


def test_no_other_format_beats_the_front() -> None:
    assert pareto_front(ROWS) == ["q4_k_s", "q4_k_m", "q8_0"]
    assert pareto_front([row("a", 10, 0.1), row("b", 10, 0.05)]) == ["b"]
    assert pareto_front([]) == []


def test_the_smallest_within_the_limit_is_recommended() -> None:
    choice = recommend(ROWS, 0.02)
    assert (choice.name, choice.within) == ("q4_k_m", True)
    assert "0.0120 at" in choice.reason and "q4_k_s, has 0.0300" in choice.reason and "0.02 nats" in choice.reason
    assert recommend(ROWS, 0.001).name == "q8_0"
    assert recommend(ROWS, 1.0).name == "q4_k_s"


def test_the_upper_end_of_the_interval_and_the_loss_count() -> None:
    sure, unsure = row("sure", 20, 0.018), row("unsure", 10, 0.018, spread=0.01)
    assert recommend([sure, unsure], 0.02).name == "sure"
    lossy = row("lossy", 10, 0.001, loss=0.5)
    assert recommend([lossy, row("wide", 30, 0.0005)], 0.02).name == "wide"


def test_without_a_format_within_the_limit_the_closest_one_is_named() -> None:
    choice = recommend(ROWS, 1e-6)
    assert (choice.name, choice.within) == ("q8_0", False)
    assert "no measured format" in choice.reason
    assert recommend([], 0.1).name is None


def test_the_recommendation_and_the_advice_show_the_divergence_of_the_table() -> None:
    rows = [row("q2_k", 40, 0.4, spread=0.1), row("q4_k_m", 62, 0.019, spread=0.002), row("q5_k_m", 75, 0.012)]
    choice = recommend(rows, 0.02)
    assert choice.name == "q5_k_m" and "q4_k_m, has 0.0190 (its 95 % interval reaches 0.0210)" in choice.reason
    _, tests, balance = check_advice(rows, 0.02)
    assert "q2_k 0.4000;" in tests.measured and "0.5" not in tests.measured
    assert "q5_k_m 0.0120 at" in balance.measured and "q4_k_m 0.0190 (its 95 %" in balance.measured


@pytest.mark.parametrize(
    ("num_tokens", "num_windows", "words"),
    [(17, 3, "Only 17 tokens were"), (1, 1, "Only 1 token was"), (5000, 1, "single window"), (5000, 9, None)],
)
def test_too_little_text_gives_a_warning(num_tokens: int, num_windows: int, words: str | None) -> None:
    found = warnings(num_tokens, num_windows)
    assert len(found) == (words is not None) and (words is None or words in found[0])


def test_advice_is_checked_against_the_figures() -> None:
    medium, tests, balance = check_advice([*ROWS, row("q2_k", 40, 0.4), row("q5_k_m", 75, 0.004)], 0.02)
    assert medium.verdict == "yes" and "q4_k_m 0.0120 at" in medium.measured
    assert tests.verdict == "yes" and "q2_k 0.4000" in tests.measured
    assert balance.verdict == "yes" and "q4_k_m" in balance.measured
    worse = [row("q4_k_m", 62, 0.02), row("q4_k_s", 60, 0.01)]
    assert check_advice(worse, 0.02)[0].verdict == "no"
    close = [*ROWS, row("q5_k_m", 75, 0.0040, spread=0.001), row("q5_k_s", 74, 0.0045, spread=0.001)]
    assert check_advice(close, 0.02)[0].verdict == "in part"
    assert [saying.verdict for saying in check_advice([row("nf4", 70, 0.04)], 0.02)] == ["open"] * 3


class _Checker(HTMLParser):
    """Checks that tags are closed, and collects addresses that a page could load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_shows_every_format() -> None:
    report = report_of(ROWS)
    page = render_format_page(report)
    assert _Checker(page).links == [] and "<script" not in page
    assert page.count('<svg class="chart"') == 4  # two charts, wide and narrow
    assert all(f">{each.name}<" in page for each in report.formats)
    assert page.split('class="choice"')[1].startswith(">q4_k_m<")
    assert page.count('<tr class="chosen">') == 1 and page.count('<tr class="front">') == 2
    assert "single window" in page


def test_a_page_without_divergence_or_intervals_is_rendered() -> None:
    assert '<svg class="chart"' not in render_format_page(report_of([row("q8_0", 110, 0.0)]))
    assert '<svg class="chart"' not in render_format_page(report_of([]))
    none = Figure(0.5, None, None)
    bare = dataclasses.replace(ROWS[0], quality=Quality(Figure(5.0, None, None), none, none, 1.0, none))
    page = render_format_page(report_of([bare]))
    assert page.count('<svg class="chart"') == 4 and "nan" not in page.lower().split("<svg")[1]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_nothing(width: int) -> None:
    rows = [*ROWS, row("hqq-2-g128", 55, 0.06)]
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    for each in _render(report_of(rows), None, console):
        console.print(each)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    lines = [line.strip(" ●") for line in shown.splitlines()]
    assert all(any(line.startswith(f"{each.name} ") for line in lines) for each in rows)
    assert ("Not shown in this narrow terminal: " in shown) == (width < 120)
    text = " ".join(shown.split())
    assert "Measured on 10,602 tokens of held-out.jsonl (1 window)" in text
    assert "Recommended: q4_k_m, the smallest" in text and "ingle quantize 'models/my model' --to q4_k_m" in text
