"""Invalid combinations of the options of adapters."""

from __future__ import annotations

from ingle.config.adapter import LowRankAdapter, WeightAdapter
from ingle.config.rule import Rule
from ingle.config.run import Run


def _odd_ranks(run: Run) -> list[int]:
    """Returns the odd ranks of an orthogonal start, whose halves must be equal."""
    adapter = run.adapter
    if not isinstance(adapter, WeightAdapter) or adapter.init != "orthogonal":
        return []
    return sorted({rank for rank in (adapter.rank, *adapter.rank_pattern.values()) if rank % 2})


ADAPTER_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "orthogonal-is-even",
        lambda run: bool(_odd_ranks(run)),
        lambda run: f"init = orthogonal needs even ranks, unlike {', '.join(map(str, _odd_ranks(run)))}.",
        "adapter.init, adapter.rank, adapter.rank_pattern",
        "an even rank, or --adapter.init=kaiming",
    ),
    Rule(
        "frozen-a-has-one-rate",
        lambda run: (
            isinstance(run.adapter, LowRankAdapter) and not run.adapter.trains_a and run.adapter.lora_plus_ratio != 1
        ),
        "lora_plus_ratio is the learning rate of B divided by that of A, but freeze_a trains no A.",
        "adapter.freeze_a, adapter.lora_plus_ratio",
        ("adapter.lora_plus_ratio=1", "adapter.freeze_a=false"),
    ),
    Rule(
        "precondition-needs-frozen-a",
        lambda run: isinstance(run.adapter, WeightAdapter) and run.adapter.precondition and not run.adapter.freeze_a,
        "The gradient of B is preconditioned by a frozen A only.",
        "adapter.precondition, adapter.freeze_a",
        ("adapter.freeze_a=true", "adapter.precondition=false"),
    ),
)
