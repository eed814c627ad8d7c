"""What a run prints besides its progress: the plan, the audit, the comparison and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ingle import wording
from ingle.wording import count, duration, p_value, score, size, title

#: Characters of a prompt or an answer shown in the terminal; the report holds them whole.
_SHOWN_CHARACTERS = 600
#: Purposes of memory that the plan names.
_SHOWN_PARTS = 4
#: Signs and colours of differences that are significant after correction.
_SIGNS = {"better": ("✓", "green"), "worse": ("✗", "red")}
#: Marks metrics of which less is better.
_DOWN = "↓"
#: Columns of the comparison that a narrow terminal does without.
_OPTIONAL = ("95 % interval", "p", "corrected p", "exact p")


def plan_table(run: Mapping[str, Any], plan: Mapping[str, Any]) -> Table:
    """The resolved plan of a run, two columns."""
    table = Table(title="Plan", box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _plan_rows(run, plan):
        table.add_row(name, text)
    return table


def _rounding(adapter: Mapping[str, Any], base: str) -> str:
    """Which steps train through the rounding of the merge, as far as any do."""
    if aware := adapter.get("merge_aware"):
        return f", the last {aware['fraction']:.0%} of the steps through the rounding of {aware['format'] or base}"
    return f", through the rounding of {base}" if adapter.get("train_rounding") else ""


def _plan_rows(run: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    base, adapter, train = run["base"]["format"], run["adapter"], run["train"]
    share = plan["trainable_parameters"] / plan["num_parameters"] if plan["num_parameters"] else 0.0
    yield "model", f"{run['model']['id']}, {count(plan['num_parameters'])} parameters, base {base}"
    how = "all weights" if adapter["kind"] == "none" else f"{adapter['kind']}, rank {adapter.get('rank')}"
    how += _rounding(adapter, base)
    yield "trains", f"{how}: {count(plan['trainable_parameters'])} parameters ({share:.1%} of the model)"
    yield "data", ", ".join(source["path"] for source in run["data"]["sources"])
    yield (
        "steps",
        f"{plan['num_steps']:,} ({plan['num_epochs']:.3g} epochs), "
        f"{plan['global_batch_size']} sequences each = {plan['micro_batch_size']} at once x {plan['grad_accum_steps']}",
    )
    yield "tokens", f"{count(plan['num_tokens'])} in all, {count(plan['tokens_per_step'])} a step"
    yield "work", f"{plan['flops_per_token'] * plan['num_tokens']:.2e} floating-point operations"
    memory = dict(plan["memory"])
    total = memory.pop("total", sum(memory.values()))
    largest = sorted(memory.items(), key=lambda item: -item[1])
    rest = sum(num_bytes for _, num_bytes in largest[_SHOWN_PARTS:])
    shown = [*largest[:_SHOWN_PARTS], ("the rest", rest)]
    parts = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in shown if num_bytes)
    yield "memory", f"{size(total)} predicted: {parts}"
    extras = [name for name, is_on in (("recompute", train["recompute"]), ("compiled", plan["compile"])) if is_on]
    saves = f"every {plan['save_every']:,} steps" if plan["save_every"] else "at the end only"
    yield "checkpoints", ", ".join([saves, *extras])
    yield "output", run["output"]


def audit_table(audit: Mapping[str, Any]) -> RenderableType:
    """What was loaded: a row per class of module, bytes per dtype, and what stayed wide."""
    table = Table(title="Loaded", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("modules")
    for name in ("count", "parameters", "quantized", "trainable", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in audit.get("classes", ()):
        name = row["class_name"] + (f" ({row['format']})" if row["format"] else "")
        numbers = (count(row[key]) if row[key] else "–" for key in ("parameters", "quantized", "trainable"))
        table.add_row(name, str(row["modules"]), *numbers, size(row["bytes"]))
    table.add_section()
    numbers = (count(audit.get(key, 0)) for key in ("parameters", "quantized", "trainable"))
    table.add_row("all", "", *numbers, size(audit.get("bytes", 0)), style="bold")
    dtypes = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in audit.get("bytes_by_dtype", {}).items())
    lines = [Text(f"  held in: {dtypes}")]
    wide = [row for row in audit.get("unquantized", ()) if row["frozen"]]
    if wide:
        names = ", ".join(row["name"] for row in wide[:4]) + (f" and {len(wide) - 4} more" if len(wide) > 4 else "")
        lines.append(Text(f"  not quantized: {names} ({count(sum(row['parameters'] for row in wide))} parameters)"))
    fusion = audit.get("fusion", {})
    if fusion.get("fused"):
        lines.append(Text(f"  fused decoder layers: {fusion['fused']}"))
    for reason, number in fusion.get("reasons", {}).items():
        lines.append(Text(f"  not fused: {number} decoder layers ({reason})"))
    return Group(table, *lines)


def comparison_table(comparison: Mapping[str, Any]) -> RenderableType:
    """Base against tuned, a row per metric, and the verdict on the first.

    Base, tuned, difference and n are always shown.  Where the terminal is too narrow for everything, p-values go
    first; then the interval moves below its difference, then it goes; below some 55 columns, lines replace the table.
    """
    metrics = comparison.get("metrics", {})
    decisive = "corrected p" if len(metrics) > 1 else "p"
    p_values = [["p", decisive, "exact p"], ["p", decisive], [decisive], []]
    if all(row.get("p_exact", row["p"]) == row["p"] for row in metrics.values()):
        del p_values[0]
    layouts = [["95 % interval", *dict.fromkeys(names)] for names in p_values] + [["interval below"], []]
    tables = [_comparison_layout(metrics, layout) for layout in layouts]
    lines: list[RenderableType] = [_Fitting(tables, "\n".join(starmap(_comparison_line, metrics.items())))]
    if legend := _legend(metrics):
        lines.append(_note(legend, "dim"))
    if verdict := comparison.get("verdict"):
        lines.append(_note(f"{verdict}\n"))
    return Group(*lines)


def _comparison_layout(metrics: Mapping[str, Any], columns: Sequence[str]) -> Table:
    table = Table(title="Evaluation", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    for name in ("base", "tuned", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # the sign of a significant difference
    for name in (*(name for name in _OPTIONAL if name in columns), "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric, row in metrics.items():
        sign, style = _SIGNS.get(row.get("outcome", ""), ("", ""))
        interval = wording.interval(metric, row["ci95"], signed=True)
        difference = score(metric, row["delta"], signed=True)
        if "interval below" in columns:
            difference += f"\n{interval}"
        p_values = (p_value(row.get(key, row["p"])) for key in ("p", "p_holm", "p_exact"))
        optional = zip(_OPTIONAL, (interval, *p_values), strict=True)
        table.add_row(
            _metric_name(metric, row),
            score(metric, row["base"]),
            score(metric, row["tuned"]),
            Text(difference, style=style),
            Text(sign, style=style),
            *(Text(text) for name, text in optional if name in columns),
            f"{row['n']:,}",
        )
    return table


def _comparison_line(metric: str, row: Mapping[str, Any]) -> str:
    sign, _ = _SIGNS.get(row.get("outcome", ""), ("", ""))
    difference = f"{score(metric, row['delta'], signed=True)} {sign}".rstrip()
    name = _metric_name(metric, row)
    return f"{name}: {score(metric, row['base'])} → {score(metric, row['tuned'])}, {difference}, n = {row['n']:,}"


def _legend(metrics: Mapping[str, Any]) -> str:
    """What the signs of the table mean, as far as they appear in it."""
    outcomes = {row.get("outcome") for row in metrics.values()}
    signs = [f"{sign} {name}" for name, (sign, _) in _SIGNS.items() if name in outcomes]
    correction = f" after correction for {len(metrics)} metrics" if len(metrics) > 1 else ""
    parts = [f"{', '.join(signs)}: p < 0.05{correction}."] if signs else []
    if any(not row.get("higher_is_better", True) for row in metrics.values()):
        parts.append(f"{_DOWN} Lower is better.")
    return " ".join(parts)


def _metric_name(metric: str, row: Mapping[str, Any]) -> str:
    return title(metric) + ("" if row.get("higher_is_better", True) else f" {_DOWN}")


def _note(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 2))


class _Fitting:
    """The first of several tables that fits into the width at hand, or plain lines when none does."""

    def __init__(self, tables: Sequence[Table], lines: str) -> None:
        self._tables = tables
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update_width(10_000)
        fitting = (
            table for table in self._tables if Measurement.get(console, free, table).maximum <= options.max_width
        )
        yield next(fitting, _note(f"\n{self._lines}\n"))


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """The scores of one model, a row per metric."""
    metrics = summary.get("metrics", {})
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for name in ("score", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = []
    for metric, row in metrics.items():
        cells = [_metric_name(metric, row), score(metric, row["value"]), wording.interval(metric, row["ci95"])]
        table.add_row(*map(Text, cells), f"{row['n']:,}")
        lines.append("{}: {} {}, n = {:,}".format(*cells, row["n"]))
    shown, legend = _Fitting([table], "\n".join(lines)), _legend(metrics)
    return Group(shown, _note(legend, "dim")) if legend else shown


def side_by_side(comparison: Mapping[str, Any], num_shown: int) -> Iterator[RenderableType]:
    """Answers of base and tuned: to the largest gain, to the largest loss, then to samples drawn at random."""
    shown = comparison.get("shown", {})
    picked = [("largest gain", index) for index in shown.get("gains", [])[:1]]
    picked += [("largest loss", index) for index in shown.get("losses", [])[:1]]
    already = [index for _, index in picked]
    picked += [("drawn at random", index) for index in shown.get("random", []) if index not in already]
    for reason, index in picked[:num_shown]:
        sample = comparison["samples"][index]
        if sample.get("base") is None and sample.get("tuned") is None:
            continue
        table = Table(title=f"Sample {index + 1}, {reason}", box=box.SIMPLE_HEAD, title_justify="left", expand=True)
        table.add_column("", no_wrap=True, style="bold", width=9)
        table.add_column("", overflow="fold", ratio=1)
        table.show_header = False
        table.add_row("prompt", _clip(sample.get("prompt", "")))
        for reference in list(sample.get("references", ()))[:1]:
            table.add_row("reference", _clip(reference))
        table.add_section()
        for side in ("base", "tuned"):
            table.add_row(side, _clip(sample.get(side) or "") or Text("(empty)", style="dim"))
        yield table


def _clip(text: str) -> Text:
    shown = text.strip()
    return Text(shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…")


def finish_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the run took, and what was predicted; values that are no numbers are left out."""
    num_steps, num_tokens = _number(summary, "num_steps"), _number(summary, "num_tokens")
    wall_s, tokens_per_s = _number(summary, "wall_s"), _number(summary, "tokens_per_s")
    parts = []
    if num_steps is not None:
        parts.append(f"{num_steps:,.0f} steps" + (", " if num_tokens is not None else " "))
    if num_tokens is not None:
        parts.append(f"{count(num_tokens)} tokens ")
    if wall_s is not None:
        parts.append(f"in {duration(wall_s)} ")
    if tokens_per_s is not None:
        parts.append(f"at {count(tokens_per_s)} tokens/s")
    if parts:
        yield "Finished: " + "".join(parts).strip() + "."
    peak, predicted = _number(summary, "peak_memory_bytes"), _number(summary, "plan", "memory", "total")
    if peak:
        yield f"Peak memory: {size(peak)} measured" + (f", {size(predicted)} predicted." if predicted else ".")


def _number(values: Any, *path: str) -> float | None:
    """A number inside nested dictionaries that were read from a file; None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, int | float) and abs(values) < 1e30 else None
