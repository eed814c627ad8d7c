"""Builds the optimizer of a run: groups trained parameters, and chooses the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ingle.adapters import lora_modules, trainable_parameters
from ingle.config.adapter import AdapterConfig, LowRankAdapter, WeightAdapter
from ingle.config.optim import Apollo, GaLore, Lisa, OptimConfig, Subspace
from ingle.config.run import Run
from ingle.errors import ConfigError
from ingle.parallel import Mesh, full, is_sharded, local, with_local
from ingle.training.lisa import LayerSampling
from ingle.training.low_rank import LowRank
from ingle.training.optim import Optimizer, ParameterGroup
from ingle.training.subspace import SubspaceOptimizer


class Owner(Protocol):
    """A module around a model that trains more than the model, perhaps with learning rates of its own."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields all parameters, those of the model too."""

    def lr_ratio(self, name: str) -> float:
        """Returns the factor on the learning rate of a parameter, by its name in the model or in this module."""


def build_optimizer(
    run: Run, model: nn.Module, layers: Sequence[nn.Module], mesh: Mesh | None = None, more: Owner | None = None
) -> Optimizer:
    """Builds the optimizer that ``optim.rule`` names.

    Args:
        run: The config.
        model: The model, with its initial weights.
        layers: Its repeated layers.
        mesh: The ranks.
        more: The module around the model, if it trains more.

    Raises:
        ConfigError: The rule does not fit the model.
    """
    optim, rule = run.optimizer, run.optim.rule
    groups = parameter_groups(model, run.adapter, optim, more)
    layer_of = {name: number for number, layer in enumerate(layers) for name in _names(model, layer)}
    match rule:
        case Subspace():
            parameters = [member for group in groups for member in group.parameters]
            _require_room(rule, sum(parameter.numel() for _, parameter in parameters))
            chosen = "fastfood" if run.adapter.kind == "none" else "index"
            kind = chosen if rule.projection == "auto" else rule.projection
            return SubspaceOptimizer(parameters, optim, rule, kind, mesh)
        case Lisa():
            _require_layers(rule, len(layers))
            return LayerSampling(groups, optim, rule, layer_of, run.seed, mesh)
        case GaLore() | Apollo():
            everything = [member for group in groups for member in group.parameters]
            matrices = [n for n, p in everything if n in layer_of and p.dim() == 2 and min(p.shape) > rule.rank]
            _require_matrices(rule, matrices)
            return Optimizer(groups, optim, mesh, low_rank=LowRank(matrices, rule, optim, run.seed, mesh))
        case _:
            return Optimizer(groups, optim, mesh, precondition=_preconditions(model, run.adapter))


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
    return [ParameterGroup(tuple(members), *key[:2]) for key, members in groups.items()]


def _names(model: nn.Module, layer: nn.Module) -> list[str]:
    inside = {id(parameter) for parameter in layer.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def _preconditions(model: nn.Module, adapter: AdapterConfig) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns the functions of the gradients of B that LoRA-FA prescribes, by the names of B.

    The gradient of B becomes ``(A A^T)^-1 / scale^2`` times itself, so that the change of the weight follows the
    gradient of the weight as closely as A allows.

    Source: PEFT's ``LoraFAOptimizer``; Zhang et al. 2023, "LoRA-FA" (arXiv 2308.03303).
    """
    if not isinstance(adapter, WeightAdapter) or not adapter.precondition:
        return {}
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for path, layer in lora_modules(model).items():
        a_RI = full(layer.lora_a).detach().double()
        inverse_RR = (torch.linalg.pinv(a_RI @ a_RI.t(), hermitian=True) / layer.scale**2).float()
        found[f"{path}.lora_b"] = partial(_times, inverse_RR)
    return found


def _times(inverse_RR: Tensor, gradient_OR: Tensor) -> Tensor:
    return with_local(gradient_OR, local(gradient_OR) @ inverse_RR)


def _require_room(rule: Subspace, num_parameters: int) -> None:
    if rule.dim >= num_parameters:
        raise ConfigError(
            f"A subspace of {rule.dim:,} directions is not smaller than the {num_parameters:,} weights in it.",
            where="optim.rule.dim",
            fix=f"--optim.rule.dim={max(1, num_parameters // 10)}, or --optim.rule=adamw",
        )


def _require_layers(rule: Lisa, num_layers: int) -> None:
    if rule.active > num_layers:
        raise ConfigError(
            f"LISA cannot draw {rule.active} of {num_layers} layers.",
            where="optim.rule.active",
            fix=f"--optim.rule.active={max(1, num_layers // 2)}" if num_layers else "--optim.rule=adamw",
        )


def _require_matrices(rule: GaLore | Apollo, matrices: Sequence[str]) -> None:
    if not matrices:
        raise ConfigError(
            f"No matrix of the layers has more than {rule.rank} rows and columns, so {rule.kind} would save nothing.",
            where="optim.rule.rank",
            fix="a smaller --optim.rule.rank, or --optim.rule=adamw",
        )
