"""What a run prints besides its progress: the plan, the audit, the comparison and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ingle.wording import count, duration, p_value, score, size, title

#: Characters of a prompt or an answer shown in the terminal; the report holds them whole.
_SHOWN_CHARACTERS = 600
#: Purposes of memory that the plan names.
_SHOWN_PARTS = 4


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
    """Base against tuned, a row per metric, and the verdict on the first."""
    table = Table(title="Evaluation", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric", no_wrap=True)
    for name in ("base", "tuned", "difference", "95 % interval", "p", "exact p", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric, row in comparison.get("metrics", {}).items():
        interval = ", ".join(score(metric, bound, signed=True).removesuffix(" %") for bound in row["ci95"])
        style = {"better": "green", "worse": "red"}.get(row.get("outcome", ""), "")
        table.add_row(
            title(metric) + ("" if row.get("higher_is_better", True) else " (less is better)"),
            score(metric, row["base"]),
            score(metric, row["tuned"]),
            Text(score(metric, row["delta"], signed=True), style=style),
            f"[{interval}]".replace("[", r"\["),
            p_value(row["p"]),
            p_value(row.get("p_exact", row["p"])),
            f"{row['n']:,}",
        )
    verdict = comparison.get("verdict")
    return Group(table, Text(f"  {verdict}")) if verdict else table


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """The scores of one model, a row per metric."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    for name in ("score", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric, row in summary.get("metrics", {}).items():
        interval = ", ".join(score(metric, bound).removesuffix(" %") for bound in row["ci95"])
        table.add_row(
            title(metric) + ("" if row.get("higher_is_better", True) else " (less is better)"),
            score(metric, row["value"]),
            rf"\[{interval}]",
            f"{row['n']:,}",
        )
    return table


def side_by_side(comparison: Mapping[str, Any], num_shown: int) -> Iterator[RenderableType]:
    """Answers of base and tuned beside one another: the largest gain, the largest loss, the rest drawn blindly."""
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
    """What the run took, predicted beside measured."""
    parts = []
    if summary.get("num_steps") is not None:
        parts.append(f"{summary['num_steps']:,} steps")
    if summary.get("num_tokens") is not None:
        parts.append(f"{count(summary['num_tokens'])} tokens")
    if summary.get("wall_s") is not None:
        parts.append(f"in {duration(summary['wall_s'])}")
    if summary.get("tokens_per_s") is not None:
        parts.append(f"at {count(summary['tokens_per_s'])} tokens/s")
    if parts:
        yield "finished: " + " ".join(parts).replace(" steps ", " steps, ", 1)
    if summary.get("peak_memory_bytes"):
        predicted = (summary.get("plan") or {}).get("memory", {}).get("total")
        beside = f", {size(predicted)} predicted" if predicted else ""
        yield f"peak memory: {size(summary['peak_memory_bytes'])} measured{beside}"
