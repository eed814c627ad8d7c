"""Tables and pages of ``ingle rank`` and ``ingle methods``, from the content of their JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ingle.report.charts import Estimate, both_widths, size_chart
from ingle.report.templates import render
from ingle.wording import count, duration, plural, size

Content = Mapping[str, Any]
#: A title, and the cells of each row by the title of their column.
Table = tuple[str, list[dict[str, str]]]


def study_tables(content: Content, study: str) -> tuple[list[Table], list[str]]:
    """Returns the tables of a study, and the sentences below them.

    Args:
        content: The content of its JSON.
        study: ``rank`` or ``methods``.
    """
    if study == "methods":
        lines = [
            f"{row['name']} is not possible here: {row['refused']}" for row in content["methods"] if row["refused"]
        ]
        tables = [("Methods", _method_rows(content)), ("What they cost", _cost_rows(content))]
        return tables, [_method_sentence(content), *lines]
    chosen = content["recommendation"]
    lines = [chosen["reason"]]
    if chosen["rank"] is not None:
        options = f"--adapter.rank={chosen['rank']} --optim.lr={chosen['lr']:g}"
        lines.append(f"Recommended: {options} (ranks {chosen['low']} to {chosen['high']} at 95 %)")
    return [("Ranks", _rank_rows(content)), *_curve_tables(content)], lines


def render_study_page(content: Content, study: str) -> str:
    """Returns the page of a study as HTML; see :func:`study_tables`."""
    task, cost = content["task"], content["cost"]
    subtitle = [
        task["model"],
        ", ".join(task["data"]),
        f"{plural(task['steps'], 'step')} per trial",
        f"{plural(cost['trials'], 'trial')} in {duration(cost['seconds'])}",
        plural(len(cost["seeds"]), "seed"),
    ]
    tables, lines = study_tables(content, study)
    if study == "methods":
        word, choice, charts = "Best score", _best_method(content), list(_method_charts(content))
    else:
        rank = content["recommendation"]["rank"]
        word, choice = "Recommended", "see below" if rank is None else f"rank {rank}"
        charts = [*_curve_charts(content), *_rank_charts(content)]
        if content["layers"]:
            tables.append(("Directions that each layer of the largest rank uses", _layer_rows(content)))
    return render(
        "study.html",
        "report.css",
        "formats.css",
        study=study,
        name=Path(task["model"]).name,
        subtitle=" · ".join(subtitle),
        word=word,
        choice=choice,
        lines=lines,
        charts=charts,
        tables=tables,
    )


def _rank_rows(content: Content) -> list[dict[str, str]]:
    chosen = content["recommendation"]["rank"]
    return [
        {
            "rank": "full" if row["rank"] is None else f"{row['rank']}{' ●' if row['rank'] == chosen else ''}",
            "parameters": count(row["parameters"]),
            "loss": f"{row['score']:.4f}",
            "above the best": f"{row['difference']:.4f} [{row['ci95'][0]:.4f}, {row['ci95'][1]:.4f}]",
            "p": _probability(row["p_vs_best"]),
            "learning rate": _rate(row),
        }
        for row in content["ranks"]
    ]


def _curve_tables(content: Content) -> Iterator[Table]:
    for curve in content["curves"]:
        yield (
            _title(curve),
            [
                {
                    "directions": f"{point['d']:,}",
                    "loss": f"{point['mean']:.4f}",
                    "over seeds": "" if point["se"] is None else f"± {point['se']:.4f}",
                    "over rates": f"{point['over_rates']['low']:.4f} to {point['over_rates']['high']:.4f}",
                    "of the gain": f"{100 * _gain(curve, point['mean']):.1f} %",
                    "learning rate": _rate(point),
                }
                for point in curve["points"]
            ],
        )


def _layer_rows(content: Content) -> list[dict[str, str]]:
    pattern = content["recommendation"]["rank_pattern"]
    return [
        {
            "layer": layer["path"],
            "directions": f"{layer['rank']}",
            "over seeds": f"{layer['low']} to {layer['high']}",
            "share of the change": f"{100 * layer['energy']:.1f} %",
            "rank": f"{pattern.get(layer['path'], '')}",
        }
        for layer in content["layers"]
    ]


def _method_rows(content: Content) -> list[dict[str, str]]:
    reference = content["score"]["reference"]
    return [
        {
            "method": f"{row['name']}{' ●' if row.get('front') else ''}",
            content["score"]["name"]: _interval(row["score"]),
            f"worse than {reference} by": _difference(row),
            "p": _probability(row["worse_by"]["p_holm"]) if "worse_by" in row else "",
            "learning rate": _rate(row),
        }
        for row in _measured(content)
    ]


def _cost_rows(content: Content) -> list[dict[str, str]]:
    return [
        {
            "method": row["name"],
            "trained": count(row["parameters"]),
            "of all": f"{100 * row['share']:.3g} %",
            "memory": size(row["peak_memory_bytes"]),
            "planned": size(row["planned_memory_bytes"]),
            "s/step": f"{row['step_s']:.3g}",
            "on disk": size(row["result_bytes"]),
            "merges": "yes" if row["merges"] else "no",
        }
        for row in _measured(content)
    ]


def _method_sentence(content: Content) -> str:
    losers = [row["name"] for row in _measured(content) if row.get("worse_by", {}).get("outcome") == "worse"]
    winners = [row["name"] for row in _measured(content) if row.get("worse_by", {}).get("outcome") == "better"]
    reference = content["score"]["reference"]
    parts = [f"better than {reference}: {', '.join(winners) or 'none'}", f"worse: {', '.join(losers) or 'none'}"]
    if sum("worse_by" in row for row in _measured(content)) > len(winners) + len(losers):
        parts.append("the others cannot be told apart at 5 %")
    return f"By {content['score']['name']}, {'; '.join(parts)}. ● = no other method is better with fewer parameters."


def _best_method(content: Content) -> str:
    sign = 1 if content["score"]["higher_is_better"] else -1
    return str(max(_measured(content), key=lambda row: sign * row["score"]["value"])["name"])


def _method_charts(content: Content) -> Iterator[dict[str, Any]]:
    best, name = _best_method(content), content["score"]["name"]
    rows = [row for row in _measured(content) if row["parameters"] > 0]
    reference = next((row for row in rows if row["name"] == content["score"]["reference"]), rows[0])

    def chart(heading: str, key: str, across: str, note: str, unit: float = 1.0) -> dict[str, Any]:
        dots = [
            Estimate(
                row["name"],
                row["score"]["value"],
                row["score"]["low"],
                row["score"]["high"],
                "chosen" if row["name"] == best else "front" if row["front"] else "other",
                f"{row['name']}: {name} {_interval(row['score'])}, {count(row['parameters'])} parameters, "
                f"{size(row['peak_memory_bytes'])}, {row['step_s']:.3g} s per step",
                row[key] / unit,
            )
            for row in rows
        ]
        draw = partial(
            size_chart,
            dots,
            titles=(across, name),
            mark=(reference["score"]["value"], reference["name"]),
            log=False,
            log_size=key == "parameters",
            has_front=False,
        )
        return {"heading": heading, "note": note, **both_widths(lambda width: draw(width=width))}

    yield chart(
        "Score and size",
        "parameters",
        "trained parameters",
        "Bars are 95 % intervals over seeds and rows; differences between methods are paired.",
    )
    yield chart("Score and time", "step_s", "seconds per step", "The fastest trial of each method.")
    note = "The highest memory in a step of training: on a GPU what is allocated, on a CPU that of the process."
    yield chart("Score and memory", "peak_memory_bytes", "MiB", note, 2.0**20)


def _measured(content: Content) -> list[Mapping[str, Any]]:
    return [row for row in content["methods"] if row["refused"] is None]


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def _difference(row: Mapping[str, Any]) -> str:
    if (worse := row.get("worse_by")) is None:
        return ""
    return f"{worse['value']:+.4f} [{worse['ci95'][0]:+.4f}, {worse['ci95'][1]:+.4f}]"


def _curve_charts(content: Content) -> Iterator[dict[str, Any]]:
    for curve in content["curves"]:
        target = curve["floor"] - content["threshold"] * (curve["floor"] - curve["ceiling"])
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
            best + row["ci95"][0],
            best + row["ci95"][1],
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
    return f"Random directions ({curve['method'].upper()}) in the space of {space}"


def _dimension_text(curve: Mapping[str, Any]) -> str:
    d90, largest = curve["d90"], curve["points"][-1]["d"]
    if not d90["has_gain"]:
        return "Training does not lower the loss at 5 %."
    if not d90["reached"]:
        return f"The target is not reached with up to {largest:,} directions."
    low = "fewer" if d90["low"] is None else f"{d90['low']:,.0f}"
    high = f"more than {largest:,}" if d90["high"] is None else f"{d90['high']:,.0f}"
    return f"The target needs about {d90['value']:,.0f} directions, 95 % interval {low} to {high}."


def _gain(curve: Mapping[str, Any], loss: float) -> float:
    return float((curve["floor"] - loss) / ((curve["floor"] - curve["ceiling"]) or 1.0))


def _bars(mean: float, stderr: float | None) -> tuple[float, float]:
    return (math.nan, math.nan) if stderr is None else (mean - stderr, mean + stderr)


def _probability(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"  # resampling does not resolve less


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['lr']:.3g}{' (edge)' if row['at_edge'] else ''}"
