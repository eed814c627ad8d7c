"""The methods that ``ingle methods`` compares: their sections, and where their learning rates are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ingle.config.adapter import LowRankAdapter
from ingle.config.run import Run

#: Rank of LoRA and DoRA in a config that has no low-rank adapter.
_RANK = 16


@dataclass(frozen=True, slots=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: Its name on the command line.
        sections: Sections ``adapter`` to try in this order; the first one that the model accepts is the method.
        lr_factor: Its usual learning rate divided by that of LoRA, the middle of the first grid.
        merges: Whether the result can be merged into the weights of the base.
    """

    name: str
    sections: tuple[Mapping[str, Any], ...]
    lr_factor: float
    merges: bool


def methods_of(run: Run) -> dict[str, Method]:
    """Returns all methods by name, with the rank and the targets of the config's own adapter."""
    own: dict[str, Any] = {"rank": _RANK}
    if isinstance(run.adapter, LowRankAdapter):
        own = {"rank": run.adapter.rank, "target_modules": run.adapter.target_modules}
    whole = "head.*" if run.objective.kind in ("mlm", "span") else "lm_head"
    heads = (
        {"kind": "lora", "target_modules": "none"},
        {"kind": "lora", "target_modules": "none", "trainable_modules": [whole]},
    )
    methods = (
        Method("full", ({"kind": "none"},), 0.1, True),
        Method("lora", ({"kind": "lora", **own},), 1.0, True),
        Method("dora", ({"kind": "dora", **own},), 1.0, True),
        Method("bottleneck", ({"kind": "bottleneck"},), 1.0, False),
        Method("prefix", ({"kind": "prefix"},), 5.0, False),
        Method("prompt", ({"kind": "prompt"},), 20.0, False),
        Method("ia3", ({"kind": "ia3"},), 10.0, True),
        Method("bitfit", ({"kind": "bitfit"}, {"kind": "bitfit", "biases": False, "norms": True}), 5.0, True),
        Method("head", heads, 5.0, True),
    )
    return {method.name: method for method in methods}
