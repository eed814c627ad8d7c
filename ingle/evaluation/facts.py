"""What a run took and what was predicted: the figures of the page's last section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.config.run import Run
from ingle.wording import duration, size


def list_facts(run: Run, report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and small print of what the run took."""
    plan, audit = report.get("plan", {}), report.get("audit", {})
    facts = []

    def add(label: str, value: str | None, note: str = "") -> None:
        if value:
            facts.append((label, value, note))

    if "train_s" in report:
        evaluated = report.get("wall_s", report["train_s"]) - report["train_s"]
        add(
            "Training time", duration(report["train_s"]), f"+ {duration(evaluated)} evaluation" if evaluated > 1 else ""
        )
    elif "wall_s" in report:
        add("Time", duration(report["wall_s"]))
    if "tokens_per_s" in report:
        add("Speed", f"{report['tokens_per_s']:,.0f} tokens/s", "averaged over the training time")
    if "num_steps" in report:
        add(
            "Steps",
            f"{report['num_steps']:,}",
            f"{plan['num_epochs']:.3g} epochs · {plan['global_batch_size']:,} sequences a step" if plan else "",
        )
    if "num_tokens" in report:
        add("Tokens read", f"{report['num_tokens']:,}", f"predicted {plan['num_tokens']:,}" if plan else "")
    if report.get("peak_memory_bytes"):
        predicted = plan.get("memory", {}).get("total")
        add("Peak memory", size(report["peak_memory_bytes"]), f"predicted {size(predicted)}" if predicted else "")
    if audit.get("trainable"):
        share = audit["trainable"] / audit["parameters"]
        add("Trained parameters", f"{audit['trainable']:,}", f"{share:.2%} of {audit['parameters']:,}")
    base = "" if run.base.format == "none" else f"{run.base.format.upper()} base · "
    add("Objective", run.objective.kind.upper(), f"{base}{'packed' if run.data.packing else 'unpacked'} sequences")
    if rounding := report.get("rounding"):
        add(
            "Tuned answers",
            f"merged into {', '.join(rounding['formats']).upper()}",
            f"trained through its rounding from step {rounding['first_step']:,} on; "
            f"packing took {duration(rounding['packing_s'])}",
        )
    if contamination := report.get("contamination"):
        same = contamination["same_prompt"]
        note = f"{contamination['same_row']:,} with the same answer" if same else "by prompt"
        add("Held-out rows in the training data", f"{same:,} of {contamination['rows']:,}", note)
    add("Optimizer", "AdamW", f"peak learning rate {run.optim.lr:g}, {run.optim.schedule}")
    add("Seed", str(run.seed))
    return facts


def compare_memory(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Predicted bytes by purpose and the measured peak, as shares of the longer bar; None without both."""
    parts = {k: v for k, v in report.get("plan", {}).get("memory", {}).items() if k != "total" and v > 0}
    measured = report.get("peak_memory_bytes") or 0
    predicted = sum(parts.values())
    if not parts or not measured:
        return None
    longest = max(predicted, measured)
    return {
        "parts": [
            {"name": name, "size": size(value), "share": 100 * value / longest, "tone": index % 8}
            for index, (name, value) in enumerate(sorted(parts.items(), key=lambda item: -item[1]))
        ],
        "predicted": size(predicted),
        "measured": size(measured),
        "measured_share": 100 * measured / longest,
        "ratio": f"{measured / predicted:.0%}",
    }


def list_modules(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the model is made of, a row for each class of module."""
    return [
        {
            "name": row["class_name"],
            "format": row["format"] or "–",
            "modules": f"{row['modules']:,}",
            "parameters": f"{row['parameters']:,}",
            "quantized": f"{row['quantized']:,}" if row["quantized"] else "–",
            "trainable": f"{row['trainable']:,}" if row["trainable"] else "–",
            "size": size(row["bytes"]),
        }
        for row in report.get("audit", {}).get("classes", ())
    ]
