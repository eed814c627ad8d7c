"""``formats.html``: the table and the charts on one page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ingle.evaluation.formats.chart import Axes, Dot, size_chart
from ingle.evaluation.formats.wording import row_cells, value
from ingle.report.templates import render
from ingle.wording import plural

#: Widths of the two drawings of a chart, in pixels.
WIDE, NARROW = 880, 340

#: A format that loses more than this many nats a token answers nonsense; it stands at the edge of the chart.
_NONSENSE = 1.0
#: What loses more than this many times the limit stands at the edge of the chart of perplexities.
_CLOSE = 5.0


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        report: What :func:`ingle.evaluation.formats.compare_formats` returned.
    """
    return render(
        "formats.html",
        "report.css",
        "formats.css",
        name=Path(report["subject"]["model"]).name,
        subtitle=_subtitle(report),
        report=report,
        rows=[_row(row, report) for row in [*report["formats"], report["reference"]]],
        charts=_charts(report),
        limit=f"{report['limit']:g}",
    )


def _subtitle(report: Mapping[str, Any]) -> str:
    subject = report["subject"]
    parts = [
        subject["model"],
        subject["data"],
        f"{plural(report['num_tokens'], 'token')} in {plural(report['num_windows'], 'window')}",
        f"computed in {subject['dtype']}",
    ]
    if subject["imatrix"]:
        parts.append(f"importance matrix {subject['imatrix']}")
    return " · ".join(parts)


def _row(row: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    chosen = row["name"] == report["recommendation"]["name"]
    return row_cells(row) | {"chosen": chosen, "front": row["name"] in report["front"]}


def _charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in report["formats"] if row["quality"]["kl"]["value"] > 0]
    if not rows:
        return []
    unit, name = _unit(rows)
    limit, base = report["limit"], report["reference"]["quality"]["perplexity"]["value"]
    across = f"size of the weights' file, {name}"
    divergence = Axes(across, "divergence, nats a token", limit, f"limit {limit:g}", _NONSENSE)
    top = base * math.exp(min(_CLOSE * limit, _NONSENSE))
    perplexity = Axes(across, "perplexity", base, f"unpacked {value(base)}", top, logarithmic=False, has_front=False)
    return [
        {
            "heading": "Divergence",
            "note": "Mean Kullback-Leibler divergence of the packed model's predictions from the unpacked one's. It "
            "sees every change, even where gains on some tokens hide losses on others.",
            **_both([_dot(row, "kl", report, unit) for row in rows], divergence),
        },
        {
            "heading": "Perplexity",
            "note": "Of the text itself. Bars are intervals of the difference from the unpacked model, token by "
            "token; an arrow marks a format beyond the edge of the chart.",
            **_both([_dot(row, "perplexity", report, unit) for row in rows], perplexity),
        },
    ]


def _unit(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    largest = max(row["size_bytes"] for row in rows)
    return (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")


def _dot(row: Mapping[str, Any], key: str, report: Mapping[str, Any], unit: float) -> Dot:
    lost, ends = row["quality"][key]["value"], _ends(row, key, report["reference"])
    kind = "front" if row["name"] in report["front"] else "other"
    if row["name"] == report["recommendation"]["name"]:
        kind = "chosen"
    cells = row_cells(row)
    note = (
        f"{row['name']}: {cells['size']}, {cells['bits']} bits a weight, divergence {cells['kl']}, "
        f"perplexity {cells['perplexity']}, decodes {cells['rate']} weights/s"
    )
    return Dot(row["name"], row["size_bytes"] / unit, lost, *ends, kind, note)


def _ends(row: Mapping[str, Any], key: str, reference: Mapping[str, Any]) -> tuple[float, float]:
    """The interval that is drawn: for a perplexity that of its difference from the unpacked model's."""
    figure = row["quality"]["loss" if key == "perplexity" else key]
    if figure["low"] is None:
        return math.nan, math.nan
    if key != "perplexity":
        return figure["low"], figure["high"]
    base = reference["quality"]["perplexity"]["value"]
    return base * math.exp(figure["low"]), base * math.exp(min(figure["high"], 100.0))


def _both(dots: Sequence[Dot], axes: Axes) -> dict[str, Markup]:
    return {name: Markup(size_chart(dots, axes, width=width)) for name, width in (("wide", WIDE), ("narrow", NARROW))}
