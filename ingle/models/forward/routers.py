"""Records the logits of the routers of mixtures of experts while a model computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.models.forward.mixers import base_of
from ingle.models.text_part import text_config


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a model whose architecture defines a load-balancing loss.

    Attributes:
        modules: The routers, and the place of the logits in their outputs.
        top_k: Experts per token.
        coefficient: Weight of the loss in the config.
    """

    modules: tuple[tuple[nn.Module, int], ...]
    top_k: int
    coefficient: float

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Yields a list that fills with the logits of each router, ``[N, E]``, while the block runs."""
        logits: list[Tensor] = []

        def record(index: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                found: Tensor = output[index] if isinstance(output, tuple | list) else output
                logits.append(found.reshape(-1, found.shape[-1]))

            return hook

        handles = [module.register_forward_hook(record(index)) for module, index in self.modules]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()


def find_routers(model: PreTrainedModel) -> Routers | None:
    """Returns the routers of a model; None if its architecture defines no load-balancing loss for them."""
    # Routers that are balanced by a bias instead have no such function.
    if not hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func"):
        return None
    config = text_config(model.config)
    coefficient = getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", None))
    recorders: Any = (getattr(base_of(model), "_can_record_outputs", None) or {}).get("router_logits")
    if recorders is None or coefficient is None:
        return None
    places: list[tuple[Any, int]] = [
        (getattr(each, "target_class", each), getattr(each, "index", 0))
        for each in (recorders if isinstance(recorders, list) else [recorders])
    ]
    modules = [(module, index) for module in model.modules() for target, index in places if isinstance(module, target)]
    return Routers(tuple(modules), int(config.num_experts_per_tok), float(coefficient)) if modules else None
