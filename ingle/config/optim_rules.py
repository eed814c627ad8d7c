"""Invalid combinations of the rule of the optimizer with other options."""

from __future__ import annotations

from ingle.config.optim import AdamW, Lisa, Subspace
from ingle.config.rule import Rule
from ingle.config.run import Run

_SHARDING = ("zero1", "zero2", "zero3", "fsdp", "hsdp")


def _needs_whole_weights(run: Run) -> bool:
    return isinstance(run.optim.rule, Lisa | Subspace)


OPTIM_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "low-memory-is-for-full-fine-tuning",
        lambda run: not isinstance(run.optim.rule, AdamW | Subspace) and run.adapter.kind != "none",
        lambda run: f"{run.optim.rule.kind} saves the moments of all weights, but an adapter trains few of them.",
        "optim.rule, adapter.kind",
        ("optim.rule=adamw", "adapter.kind=none"),
    ),
    Rule(
        "whole-weights-are-not-sharded",
        lambda run: _needs_whole_weights(run) and run.parallel.kind in _SHARDING,
        lambda run: (
            f"{run.optim.rule.kind} needs all weights on every rank, but {run.parallel.kind} shares them among ranks."
        ),
        "optim.rule, parallel.kind",
        ("parallel.kind=ddp", "optim.rule=adamw"),
    ),
    Rule(
        "whole-weights-are-not-offloaded",
        lambda run: _needs_whole_weights(run) and run.parallel.offload is True,
        lambda run: (
            f"{run.optim.rule.kind} needs all weights on the device, but parallel.offload keeps them elsewhere."
        ),
        "optim.rule, parallel.offload",
        ("parallel.offload=auto", "optim.rule=adamw"),
    ),
    Rule(
        "drawn-layers-are-not-compiled",
        lambda run: isinstance(run.optim.rule, Lisa) and run.train.compile is True,
        "LISA changes which layers are trained, and compiled layers would be compiled again each time.",
        "optim.rule, train.compile",
        ("train.compile=false", "optim.rule=adamw"),
    ),
    Rule(
        "a-subspace-has-one-rate",
        lambda run: isinstance(run.optim.rule, Subspace) and getattr(run.adapter, "lora_plus_ratio", 1) != 1,
        "In a subspace, A and B have no learning rates of their own.",
        "optim.rule, adapter.lora_plus_ratio",
        ("adapter.lora_plus_ratio=1", "optim.rule=adamw"),
    ),
    Rule(
        "a-subspace-has-no-decay",
        lambda run: isinstance(run.optim.rule, Subspace) and run.optim.weight_decay > 0,
        "Coordinates of a subspace have no weight decay.",
        "optim.rule, optim.weight_decay",
        ("optim.weight_decay=0",),
    ),
)
