"""The last section of a run's page: time, memory and other figures of the run, next to their predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.config.run import Run
from ingle.report.results import RunReport
from ingle.wording import duration, plural, size

Fact = tuple[str, str, str]


def list_facts(run: Run, report: RunReport) -> list[Fact]:
    """Returns label, value and small print of each figure of the run."""
    plan, audit = report.plan, report.audit
    predicted, measured = predicted_and_measured(report)
    expected = plan.get("predicted_tokens_per_s")
    base = "" if run.base.format == "none" else f"{run.base.format.upper()} base · "
    facts = [
        (
            "Training time",
            duration(report.train_s),
            f"{duration(report.wall_s)} with loading and evaluation" if report.wall_s - report.train_s > 1 else "",
        ),
        (
            "Speed",
            f"{plan.get('measured_tokens_per_s') or report.tokens_per_s:,.0f} tokens/s",
            f"predicted {expected:,.0f} tokens/s" if expected else "averaged over the training time",
        ),
        (
            "Steps",
            f"{report.num_steps:,}",
            f"{plan['num_epochs']:.3g} epochs · {plan['global_batch_size']:,} sequences per step" if plan else "",
        ),
        ("Tokens read", f"{report.num_tokens:,}", f"predicted {plan['num_tokens']:,}" if plan else ""),
    ]
    if measured:
        facts.append(("Peak memory", size(measured), f"predicted {size(predicted)}" if predicted else ""))
    if audit.get("trainable"):
        share = audit["trainable"] / audit["parameters"]
        facts.append(("Trained parameters", f"{audit['trainable']:,}", f"{share:.2%} of {audit['parameters']:,}"))
    sequences = "packed" if run.data.packing else "unpacked"
    return [
        *facts,
        ("Objective", run.objective.kind.upper(), f"{base}{sequences} sequences"),
        *_rounding_facts(report.rounding),
        *_contamination_facts(report.contamination),
        ("Optimizer", "AdamW", f"peak learning rate {run.optimizer.lr:g}, {run.optim.schedule}"),
        ("Seed", str(run.seed), ""),
    ]


def _rounding_facts(rounding: dict[str, Any] | None) -> list[Fact]:
    if not rounding:
        return []
    note = (
        f"trained through its rounding from step {rounding['first_step']:,} on; "
        f"quantization took {duration(rounding['packing_s'])}"
    )
    return [("Tuned answers", f"merged into {', '.join(rounding['formats']).upper()}", note)]


def _contamination_facts(contamination: dict[str, Any] | None) -> list[Fact]:
    if not contamination:
        return []
    same = contamination["same_prompt"]
    note = f"{contamination['same_row']:,} with the same answer" if same else "by prompt"
    return [("Held-out rows in the training data", f"{same:,} of {contamination['rows']:,}", note)]


def predicted_and_measured(report: RunReport) -> tuple[int, int]:
    """Returns the predicted and the measured peak of a training step in bytes, 0 where there is none.

    Reports of older versions have the sum of the plan, and the peak of the process.
    """
    plan = report.plan
    predicted = plan.get("predicted_peak_bytes") or plan.get("memory", {}).get("total") or 0
    return predicted, plan.get("measured_peak_bytes") or report.peak_memory_bytes


def compare_memory(report: RunReport) -> dict[str, Any] | None:
    """Returns predicted bytes by purpose and measured peak, as shares of the longer bar; None without both."""
    parts = {name: num for name, num in report.plan.get("memory", {}).items() if name != "total" and num > 0}
    predicted, measured = predicted_and_measured(report)
    if not parts or not predicted or not measured:
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


def adapter_words(adapter: Mapping[str, Any]) -> str:
    """Returns what an adapter section trains, in a few words."""
    names = {"lora": "LoRA", "dora": "DoRA", "qa_lora": "QA-LoRA", "ia3": "IA3", "none": "full fine-tuning"}
    match adapter:
        case {"kind": str(kind), "rank": int(rank)}:
            return f"{names[kind]} rank {rank}"
        case {"kind": "bottleneck", "style": style}:
            return f"bottlenecks ({style})"
        case {"kind": "bitfit", "biases": biases, "norms": norms}:
            return " and ".join([*["biases"] * bool(biases), *["norms"] * bool(norms)])
        case {"kind": "peft", "method": method}:
            return f"PEFT's {method}"
        case {"kind": kind, "num_virtual_tokens": number}:
            return f"a {kind} of {plural(number, 'virtual token')}"
    return names[adapter["kind"]]
