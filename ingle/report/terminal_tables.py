"""Terminal tables: the plan, the audit, comparisons and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ingle.report.metrics import Metric, find_metric
from ingle.report.results import Comparison, MetricComparison, MetricSummary, RunReport, SampleComparison, Summary
from ingle.report.run_details import adapter_words, predicted_and_measured
from ingle.report.verdicts import correction, p_value
from ingle.wording import count, duration, plural, size

#: Characters shown of a prompt or an answer; the report shows all of them.
_SHOWN_CHARACTERS = 600
#: Number of uses of memory that the plan lists.
_SHOWN_PARTS = 4
#: Signs and colors of differences that are significant after correction.
_SIGNS = {"better": ("✓", "green"), "worse": ("✗", "red"), "unclear": ("", "")}
#: Marks metrics for which lower is better.
_DOWN = "↓"
#: Columns of the comparison that a narrow terminal leaves out.
_OPTIONAL = ("95 % interval", "p", "corrected p", "exact p")


def plan_table(run: Mapping[str, Any], plan: Mapping[str, Any]) -> Table:
    """Returns the plan of a run.

    Args:
        run: The resolved config as plain data.
        plan: The plan as plain data.
    """
    table = Table(title="Plan", box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _plan_rows(run, plan):
        table.add_row(name, text)
    return table


def _rounding(adapter: Mapping[str, Any], base: str) -> str:
    """Returns which steps train through the rounding of the merge; empty if none does."""
    if aware := adapter.get("merge_aware"):
        return f", the last {aware['fraction']:.0%} of the steps through the rounding of {aware['format'] or base}"
    return f", through the rounding of {base}" if adapter.get("train_rounding") else ""


def _rule(rule: Mapping[str, Any]) -> str:
    if rule["kind"] == "subspace":
        return f", along {rule['dim']:,} random directions"
    return "" if rule["kind"] == "adamw" else f", by {rule['kind']}"


def _plan_rows(run: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    base, adapter = run["base"]["format"], run["adapter"]
    share = plan["trainable_parameters"] / plan["num_parameters"] if plan["num_parameters"] else 0.0
    yield "model", f"{run['model']['id']}, {count(plan['num_parameters'])} parameters, base {base}"
    how = f"{adapter['kind']}, rank {adapter['rank']}" if "rank" in adapter else adapter_words(adapter)
    how = "all weights" if adapter["kind"] == "none" else how
    how += _rounding(adapter, base) + _rule(run["optim"].get("rule", {"kind": "adamw"}))
    yield "trains", f"{how}: {count(plan['trainable_parameters'])} parameters ({share:.1%} of the model)"
    yield "data", ", ".join(source["path"] for source in run["data"]["sources"])
    yield (
        "steps",
        f"{plan['num_steps']:,} ({plan['num_epochs']:.3g} epochs), "
        f"{plan['global_batch_size']} sequences each = {plan['micro_batch_size']} at once x {plan['grad_accum_steps']}",
    )
    yield "tokens", f"{count(plan['num_tokens'])} in total, {count(plan['tokens_per_step'])} per step"
    yield "work", f"{plan['flops_per_token'] * plan['num_tokens']:.2e} floating-point operations"
    memory = dict(plan["memory"])
    total = memory.pop("total", sum(memory.values()))
    largest = sorted(memory.items(), key=lambda item: -item[1])
    rest = sum(num_bytes for _, num_bytes in largest[_SHOWN_PARTS:])
    shown = [*largest[:_SHOWN_PARTS], ("the rest", rest)]
    parts = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in shown if num_bytes)
    yield "memory", f"{size(total)} predicted: {parts}"
    if plan.get("tokens_per_s"):
        speed = f"{count(plan['tokens_per_s'])} tokens/s on {plan['device']}"
        sampling = plan.get("rollout_hours")
        of_it = f" ({duration(3600 * sampling)} of it samples answers)" if sampling else ""
        yield "time", f"about {duration(3600 * plan['hours'])} of training{of_it}, {speed} predicted"
    strategy = {name: plan.get("strategy", {}).get(name) for name in ("recompute", "offload", "offload_activations")}
    extras = [name.replace("_", " ") for name, is_on in (*strategy.items(), ("compiled", plan["compile"])) if is_on]
    saves = f"every {plan['save_every']:,} steps" if plan["save_every"] else "at the end only"
    yield "checkpoints", ", ".join([saves, *extras])
    if plan.get("validate_every"):
        yield "validation", ", ".join(_describe_validation(run["train"], plan))
    yield "output", run["output"]


def _describe_validation(train: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    yield f"every {plural(plan['validate_every'], 'step')}"
    if plan.get("validation_hours"):
        yield f"about {duration(3600 * plan['validation_hours'])} in total"
    if train.get("keep_best"):
        yield "the best step is kept"
    if stopping := train.get("early_stopping"):
        yield f"stops after {stopping['patience']:,} without a gain"


def audit_table(audit: Mapping[str, Any]) -> RenderableType:
    """Returns what was loaded: a row per class of module, bytes per dtype, and what is not quantized.

    Args:
        audit: The audit as plain data.
    """
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
    lines = [f"  Stored as: {dtypes}"]
    kept = [row for row in audit.get("unquantized", ()) if row["frozen"]]
    if kept:
        names = ", ".join(row["name"] for row in kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        lines.append(f"  Not quantized: {names} ({count(sum(row['parameters'] for row in kept))} parameters)")
    fusion = audit.get("fusion", {})
    if fusion.get("fused"):
        lines.append(f"  Fused decoder layers: {fusion['fused']}")
    lines += [f"  Not fused: {num} decoder layers ({why})" for why, num in fusion.get("reasons", {}).items()]
    return Group(table, *map(Text, lines))


def comparison_table(comparison: Comparison | RunReport) -> RenderableType:
    """Returns base against tuned model, a row per metric, and the verdict on the first.

    Base, tuned, difference and n are always shown. If the terminal is too narrow for all columns, p-values are left out
    first; then the interval moves below its difference, then it is left out; below some 55 columns, lines replace the
    table.
    """
    rows = comparison.metrics
    corrected = "corrected p" if len(rows) > 1 else "p"
    p_values = [["p", corrected, "exact p"], ["p", corrected], [corrected], []]
    if all(row.p_exact == row.p for row in rows.values()):
        del p_values[0]
    layouts = [["95 % interval", *dict.fromkeys(names)] for names in p_values] + [["interval below"], []]
    tables = [_comparison_layout(rows, layout, comparison.base_name or "base") for layout in layouts]
    lines = "\n".join(_comparison_line(find_metric(name), row) for name, row in rows.items())
    parts: list[RenderableType] = [_Fitting(tables, lines)]
    if legend := _legend(rows):
        parts.append(_note(legend, "dim"))
    if comparison.verdict:
        parts.append(_note(f"{comparison.verdict}\n"))
    if isinstance(comparison, RunReport) and comparison.comparisons:
        others = (other for name, other in comparison.comparisons.items() if name != comparison.base_name)
        parts += [_note(f"{other.verdict}\n") for other in others]
    return Group(*parts)


def _comparison_layout(rows: Mapping[str, MetricComparison], columns: Sequence[str], base_name: str) -> Table:
    table = Table(title="Evaluation", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    for name in (base_name, "tuned", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)  # the sign of a significant difference
    for name in (*(name for name in _OPTIONAL if name in columns), "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        metric, (sign, style) = find_metric(name), _SIGNS[row.outcome]
        interval = metric.format_interval(row.ci95, signed=True)
        difference = metric.format(row.delta, signed=True)
        if "interval below" in columns:
            difference += f"\n{interval}"
        optional = zip(_OPTIONAL, (interval, *map(p_value, (row.p, row.p_holm, row.p_exact))), strict=True)
        table.add_row(
            _metric_name(metric),
            metric.format(row.base),
            metric.format(row.tuned),
            Text(difference, style=style),
            Text(sign, style=style),
            *(Text(text) for column, text in optional if column in columns),
            f"{row.n:,}",
        )
    return table


def _comparison_line(metric: Metric, row: MetricComparison) -> str:
    difference = f"{metric.format(row.delta, signed=True)} {_SIGNS[row.outcome][0]}".rstrip()
    return (
        f"{_metric_name(metric)}: {metric.format(row.base)} → {metric.format(row.tuned)}, {difference}, n = {row.n:,}"
    )


def _legend(rows: Mapping[str, MetricComparison | MetricSummary]) -> str:
    """Returns the meaning of the signs that the table has."""
    outcomes = {row.outcome for row in rows.values() if isinstance(row, MetricComparison)}
    signs = [f"{sign} {name}" for name, (sign, _) in _SIGNS.items() if sign and name in outcomes]
    corrected = correction(len(rows))
    parts = [f"{', '.join(signs)}: p < 0.05{f' {corrected}' if corrected else ''}."] if signs else []
    if not all(find_metric(name).higher_is_better for name in rows):
        parts.append(f"{_DOWN} Lower is better.")
    return " ".join(parts)


def _metric_name(metric: Metric) -> str:
    return metric.title if metric.higher_is_better else f"{metric.title} {_DOWN}"


def _note(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 2))


class _Fitting:
    """The first of several tables that fits the width, or plain lines if none does."""

    def __init__(self, tables: Sequence[Table], lines: str) -> None:
        self._tables = tables
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update_width(10_000)
        fitting = (
            table for table in self._tables if Measurement.get(console, free, table).maximum <= options.max_width
        )
        yield next(fitting, _note(f"\n{self._lines}\n"))


def summary_table(summary: Summary) -> RenderableType:
    """Returns the scores of one model, a row per metric."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for name in ("score", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = []
    for name, row in summary.metrics.items():
        metric = find_metric(name)
        cells = [_metric_name(metric), metric.format(row.value), metric.format_interval(row.ci95)]
        table.add_row(*map(Text, cells), f"{row.n:,}")
        lines.append("{}: {} {}, n = {:,}".format(*cells, row.n))
    shown, legend = _Fitting([table], "\n".join(lines)), _legend(summary.metrics)
    return Group(shown, _note(legend, "dim")) if legend else shown


def side_by_side(comparison: Comparison, num_shown: int) -> Iterator[RenderableType]:
    """Yields both answers to the sample of the largest gain, of the largest loss, and to random samples."""
    shown = comparison.shown
    picked = [("largest gain", index) for index in shown.gains[:1]]
    picked += [("largest loss", index) for index in shown.losses[:1]]
    already = [index for _, index in picked]
    picked += [("random", index) for index in shown.random if index not in already]
    for reason, index in picked[:num_shown]:
        sample = comparison.samples[index]
        if sample.base is not None or sample.tuned is not None:
            base_name = comparison.base_name or "base"
            names = ("prompt", "reference") if comparison.classes is None else ("text", "label")
            # One of several accepted answers, but all labels: each of them is true.
            reference = " ".join(sample.references if comparison.classes is not None else sample.references[:1])
            yield _sample_table(f"Sample {index + 1}, {reason}", sample, names, reference, base_name)


def _sample_table(
    title: str, sample: SampleComparison, names: tuple[str, str], reference: str, base_name: str
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", expand=True, show_header=False)
    table.add_column("", no_wrap=True, style="bold", width=max(9, len(base_name)))
    table.add_column("", overflow="fold", ratio=1)
    table.add_row(names[0], _clip(sample.prompt))
    table.add_row(names[1], _clip(reference) or Text("(none)", style="dim"))
    table.add_section()
    for side, answer in ((base_name, sample.base), ("tuned", sample.tuned)):
        table.add_row(side, _clip(answer or "") or Text("(empty)", style="dim"))
    return table


def _clip(text: str) -> Text:
    shown = text.strip()
    return Text(shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…")


def finish_lines(report: RunReport) -> Iterator[str]:
    """Yields lines with the steps, time and memory of the run, and the predicted memory."""
    yield (
        f"Finished in {duration(report.wall_s)}: {report.num_steps:,} steps, {count(report.num_tokens)} tokens "
        f"at {count(report.tokens_per_s)} tokens/s."
    )
    if report.validation is not None:
        yield report.validation.verdict
    predicted, measured = predicted_and_measured(report)
    if measured:
        yield f"Peak memory of training: {size(measured)} measured" + (
            f", {size(predicted)} predicted." if predicted else "."
        )
    expected, speed = report.plan.get("predicted_tokens_per_s"), report.plan.get("measured_tokens_per_s")
    if expected and speed:
        yield f"Speed of training: {count(speed)} tokens/s measured, {count(expected)} predicted."
