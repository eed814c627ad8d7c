"""Tables and the page of ``ingle rank``, from the content of ``rank.json``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ingle.report.charts import Estimate, both_widths, size_chart
from ingle.report.templates import render
from ingle.wording import count, duration, plural

Content = Mapping[str, Any]


def rank_rows(content: Content) -> list[dict[str, str]]:
    """Returns the cells of the table of ranks."""
    chosen = content["recommendation"]["rank"]
    return [
        {
            "rank": "full" if row["rank"] is None else f"{row['rank']}{' ●' if row['rank'] == chosen else ''}",
            "parameters": count(row["parameters"]),
            "loss": f"{row['score']:.4f}",
            "above the best": f"{row['difference']:.4f} [{row['ci95'][0]:.4f}, {row['ci95'][1]:.4f}]",
            "p": f"{row['p_vs_best']:.2g}",
            "learning rate": _rate(row),
        }
        for row in content["ranks"]
    ]


def curve_rows(content: Content) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields the title and the cells of the table of each curve."""
    for curve in content["curves"]:
        yield (
            _title(curve),
            [
                {
                    "directions": f"{point['d']:,}",
                    "loss": f"{point['mean']:.4f}",
                    "over seeds": "" if point["se"] is None else f"± {point['se']:.4f}",
                    "over rates": f"{point['over_rates']['low']:.4f} to {point['over_rates']['high']:.4f}",
                    "of the gain": f"{100 * _gain(content, point['mean']):.0f} %",
                    "learning rate": _rate(point),
                }
                for point in curve["points"]
            ],
        )


def render_rank_page(content: Content) -> str:
    """Returns the page of a study as HTML."""
    task, cost, chosen = content["task"], content["cost"], content["recommendation"]
    subtitle = [
        task["model"],
        ", ".join(task["data"]),
        f"{plural(task['steps'], 'step')} per trial",
        f"{plural(cost['trials'], 'trial')} in {duration(cost['seconds'])}",
        plural(len(cost["seeds"]), "seed"),
    ]
    return render(
        "rank.html",
        "report.css",
        "formats.css",
        name=Path(task["model"]).name,
        subtitle=" · ".join(subtitle),
        chosen=chosen,
        charts=[*_curve_charts(content), *_rank_charts(content)],
        ranks=rank_rows(content),
        curves=list(curve_rows(content)),
        layers=content["layers"],
        pattern=chosen["rank_pattern"],
        threshold=f"{100 * content['threshold']:g} %",
    )


def _curve_charts(content: Content) -> Iterator[dict[str, Any]]:
    score = content["score"]
    target = score["floor"] - content["threshold"] * (score["floor"] - score["ceiling"])
    for curve in content["curves"]:
        dots = [
            Estimate(
                f"{point['d']:,}",
                point["mean"],
                *_bars(point["mean"], point["se"]),
                "chosen" if point["mean"] <= target else "other",
                f"{point['d']:,} directions: loss {point['mean']:.4f}, learning rate {_rate(point)}",
                point["d"],
            )
            for point in curve["points"]
        ]
        draw = partial(
            size_chart,
            dots,
            titles=("directions", "validation loss"),
            mark=(target, f"{100 * content['threshold']:g} % of the gain"),
            log=False,
            log_size=True,
            has_front=False,
        )
        yield {
            "heading": _title(curve),
            "note": f"Loss after training along random directions. {_dimension_text(curve)}",
            **both_widths(lambda width, draw=draw: draw(width=width)),  # type: ignore[misc]
        }


def _rank_charts(content: Content) -> Iterator[dict[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = content["ranks"]
    if len(rows) < 2:
        return
    best = min(row["score"] for row in rows)
    dots = [
        Estimate(
            f"rank {row['rank']}",
            row["score"],
            *(best + end for end in row["ci95"]),
            "chosen" if row["rank"] == content["recommendation"]["rank"] else "other",
            f"rank {row['rank']}: loss {row['score']:.4f}, {count(row['parameters'])} parameters",
            row["parameters"],
        )
        for row in rows
    ]
    draw = partial(
        size_chart,
        dots,
        titles=("trained parameters", "validation loss"),
        mark=(best, "the best rank"),
        log=False,
        log_size=True,
        has_front=False,
    )
    yield {
        "heading": "Ranks",
        "note": "Loss of each rank at its best learning rate. Bars are 95 % intervals of the difference from the best "
        "rank, paired by seeds and rows.",
        **both_widths(lambda width: draw(width=width)),
    }


def _title(curve: Mapping[str, Any]) -> str:
    space = "all weights" if curve["rank"] is None else f"LoRA of rank {curve['rank']}"
    return f"{curve['method'].upper()} in the space of {space}"


def _dimension_text(curve: Mapping[str, Any]) -> str:
    d90, largest = curve["d90"], curve["points"][-1]["d"]
    if not d90["reached"]:
        return f"The target is not reached with up to {largest:,} directions."
    low = "fewer" if d90["low"] is None else f"{d90['low']:,.0f}"
    high = f"more than {largest:,}" if d90["high"] is None else f"{d90['high']:,.0f}"
    return f"The target needs about {d90['value']:,.0f} directions, 95 % interval {low} to {high}."


def _gain(content: Content, loss: float) -> float:
    score = content["score"]
    return float((score["floor"] - loss) / ((score["floor"] - score["ceiling"]) or 1.0))


def _bars(mean: float, stderr: float | None) -> tuple[float, float]:
    return (math.nan, math.nan) if stderr is None else (mean - stderr, mean + stderr)


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['lr']:.3g}{' (edge)' if row['at_edge'] else ''}"
