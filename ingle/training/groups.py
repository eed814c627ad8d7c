"""Groups trained parameters by learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from ingle.adapters import trainable_parameters
from ingle.config.adapter import AdapterConfig, LowRankAdapter
from ingle.config.optim import OptimConfig
from ingle.parallel import is_sharded
from ingle.training.optim import ParameterGroup


class Owner(Protocol):
    """A module around a model that trains more than the model, perhaps with learning rates of its own."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields all parameters, those of the model too."""

    def lr_ratio(self, name: str) -> float:
        """Returns the factor on the learning rate of a parameter, by its name in the model or in this module."""


def parameter_groups(
    model: nn.Module, adapter: AdapterConfig, optim: OptimConfig, more: Owner | None = None
) -> list[ParameterGroup]:
    """Groups all trained parameters of a model, and of the module around it.

    Weight decay does not apply to biases, norms and embeddings. The learning rate of LoRA's B is ``lora_plus_ratio``
    times that of A.

    Source: Hayou et al. 2024, "LoRA+" (arXiv 2402.12354), equation 4.
    """
    ratio = adapter.lora_plus_ratio if isinstance(adapter, LowRankAdapter) else 1.0
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[tuple[str, nn.Parameter]]] = {}
    members = trainable_parameters(model)
    if more is not None:
        known = {id(parameter) for parameter in model.parameters()}
        members += [(name, p) for name, p in more.named_parameters() if p.requires_grad and id(p) not in known]
    for name, parameter in members:
        decays = parameter.dim() >= 2 and id(parameter) not in embeddings
        lr_ratio = (ratio if name.endswith("lora_b") else 1.0) * (1.0 if more is None else more.lr_ratio(name))
        # AdamW updates a group at once, and cannot mix sharded parameters with others.
        key = (lr_ratio, optim.weight_decay if decays else 0.0, is_sharded(parameter))
        groups.setdefault(key, []).append((name, parameter))
    return [ParameterGroup(tuple(group), *key[:2]) for key, group in groups.items()]
