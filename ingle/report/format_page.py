"""Renders ``formats.html``: the table and the charts of a format survey on one self-contained page."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ingle.report.charts import Estimate, both_widths, size_chart
from ingle.report.format_results import FormatReport, FormatResult, perplexity_text, row_cells
from ingle.report.templates import render
from ingle.wording import plural

#: Formats that diverge by more nats per token than this are drawn at the edge of the chart; their answers are nonsense.
_NONSENSE = 1.0
#: Formats that lose more than this many times the limit are drawn at the edge of the chart of perplexities.
_CLOSE = 5.0


def render_format_page(report: FormatReport) -> str:
    """Returns the page of a survey as HTML."""
    subject = report.subject
    subtitle = [
        subject.model,
        subject.data,
        f"{plural(report.num_tokens, 'token')} in {plural(report.num_windows, 'window')}",
        f"computed in {subject.dtype}",
        *([f"importance matrix {subject.imatrix}"] if subject.imatrix else []),
    ]
    return render(
        "formats.html",
        "report.css",
        "formats.css",
        name=Path(subject.model).name,
        subtitle=" · ".join(subtitle),
        report=report,
        rows=[row_cells(row) | {"kind": _kind(row, report)} for row in (*report.formats, report.reference)],
        charts=_charts(report),
        limit=f"{report.limit:g}",
    )


def _charts(report: FormatReport) -> list[dict[str, Any]]:
    rows = [row for row in report.formats if row.quality.kl.value > 0]
    if not rows:
        return []
    unit, name = (2**30, "GiB") if max(row.size_bytes for row in rows) >= 2**30 else (2**20, "MiB")
    across, limit, base = f"size of the weights' file, {name}", report.limit, report.reference.quality.perplexity.value
    divergence = partial(
        size_chart,
        [_dot(row, "kl", report, unit) for row in rows],
        titles=(across, "divergence, nats per token"),
        mark=(limit, f"limit {limit:g}"),
        y_max=_NONSENSE,
    )
    perplexity = partial(
        size_chart,
        [_dot(row, "perplexity", report, unit) for row in rows],
        titles=(across, "perplexity"),
        mark=(base, f"unquantized {perplexity_text(base)}"),
        y_max=base * math.exp(min(_CLOSE * limit, _NONSENSE)),
        log=False,
        has_front=False,
    )
    return [
        {
            "heading": "Divergence",
            "note": "Mean Kullback-Leibler divergence of the quantized model's predictions from the unquantized "
            "model's. It reflects every change, even where gains on some tokens cancel losses on others in perplexity.",
            **both_widths(lambda width: divergence(width=width)),
        },
        {
            "heading": "Perplexity",
            "note": "Perplexity of the text. Bars are intervals of the difference from the unquantized model, token by "
            "token; an arrow marks a format beyond the edge of the chart.",
            **both_widths(lambda width: perplexity(width=width)),
        },
    ]


def _dot(row: FormatResult, key: Literal["kl", "perplexity"], report: FormatReport, unit: float) -> Estimate:
    cells = row_cells(row)
    note = (
        f"{row.name}: {cells['size']}, {cells['bits']} bits per weight, divergence {cells['kl']}, "
        f"perplexity {cells['perplexity']}, decodes {cells['rate']} weights/s"
    )
    figure = row.quality.kl if key == "kl" else row.quality.loss
    low, high = (math.nan if end is None else end for end in (figure.low, figure.high))
    value = row.quality.kl.value
    if key == "perplexity":  # its interval is that of the difference from the unquantized model
        value, base = row.quality.perplexity.value, report.reference.quality.perplexity.value
        low, high = base * math.exp(low), base * math.exp(min(high, 100.0))
    return Estimate(row.name, value, low, high, _kind(row, report) or "other", note, row.size_bytes / unit)


def _kind(row: FormatResult, report: FormatReport) -> str:
    """Returns the style of a row or dot: ``chosen``, ``front`` or none."""
    if row.name == report.recommendation.name:
        return "chosen"
    return "front" if row.name in report.front else ""
