"""Bottleneck adapters: a small network after a sublayer, or in parallel with it.

The network stands in the last linear layer of the sublayer, before the residual connection and a norm that follows it.
Only Ingle reads the files, since PEFT has no such adapters.

Legend: H hidden size, Z width of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ingle.adapters.kind_tensors import by_name, prefixed
from ingle.adapters.linear import AdaptedLinear, features
from ingle.adapters.lora import generator_of
from ingle.adapters.states import adapted_modules
from ingle.adapters.sublayers import Sublayer, find_sublayers, mixtures
from ingle.adapters.targets import Selection, trained_in_full
from ingle.config.adapter_kinds import Adapter, BottleneckAdapter
from ingle.errors import AdapterError
from ingle.parallel import Mesh, copy_rows, local
from ingle.planning.selection import is_inside

PEFT_TYPE = "INGLE_BOTTLENECK"
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
}


class Tap(AdaptedLinear):
    """The first linear layer of a sublayer: it keeps its input until the sublayer's last one has read it."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., I]`` to ``[..., O]`` as its base does."""
        if self.is_on:
            self.seen = x
        output: Tensor = self.base(x.to(self.product_dtype(x)))
        return output

    def is_changed(self) -> bool:
        """Returns whether the adapter changes what the layer computes."""
        return False

    def merge(self, weight_OI: Tensor) -> Tensor:
        """Returns the weight of the base, which does not change."""
        return weight_OI


class BottleneckLinear(AdaptedLinear):
    """``z + scale * up(activation(down(dropout(x))))``, where z is the output of the base.

    Args:
        base: The last linear layer of a sublayer.
        width: Z.
        function: Name of the activation.
        scale: Factor on the network.
        learned: Whether the factor is trained.
        dropout: Share of the network's inputs that are set to zero in training.
        tap: The layer whose input the network reads; None if it reads z.

    Attributes:
        bottleneck_down: ``[Z, H]``, float32.
        bottleneck_down_bias: ``[Z]``.
        bottleneck_up: ``[H, Z]``.
        bottleneck_up_bias: ``[H]``.
        bottleneck_scale: ``[1]``; None if the factor is not trained.
    """

    bottleneck_scale: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        width: int,
        function: str,
        scale: float,
        *,
        learned: bool = False,
        dropout: float = 0.0,
        tap: Tap | None = None,
    ) -> None:
        super().__init__(base)
        self.function, self.scale, self.dropout = function, scale, dropout
        self.__dict__["tap"] = tap  # it is registered where it stands
        device, hidden = self.own_device(), self.out_features
        self.bottleneck_down = nn.Parameter(torch.zeros(width, hidden, dtype=torch.float32, device=device))
        self.bottleneck_down_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        self.bottleneck_up = nn.Parameter(torch.zeros(hidden, width, dtype=torch.float32, device=device))
        self.bottleneck_up_bias = nn.Parameter(torch.zeros(hidden, dtype=torch.float32, device=device))
        self.bottleneck_scale = None
        if learned:
            self.bottleneck_scale = nn.Parameter(torch.full((1,), scale, dtype=torch.float32, device=device))

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """Draws ``down`` uniformly from ``+-1/sqrt(H)`` and sets ``up`` to zero, so training starts from the base."""
        down, bound = self.bottleneck_down, 1 / math.sqrt(self.out_features)
        drawn = torch.empty(down.shape).uniform_(-bound, bound, generator=generator_of(seed, name))
        copy_rows(down, drawn)
        for parameter in (self.bottleneck_down_bias, self.bottleneck_up, self.bottleneck_up_bias):
            local(parameter).zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., I]`` to ``[..., H]``."""
        z: Tensor = self.base(x.to(self.product_dtype(x)))
        if not self.is_on:
            return z
        tap: Tap | None = self.__dict__["tap"]
        inputs = z
        if tap is not None:
            assert tap.seen is not None, "a sublayer calls its first linear layer before its last"
            inputs, tap.seen = tap.seen.to(z.dtype), None
        dtype, dropout = z.dtype, self.dropout if self.training else 0.0
        inputs = functional.dropout(inputs, dropout) if dropout else inputs
        hidden = functional.linear(inputs, self.bottleneck_down.to(dtype), self.bottleneck_down_bias.to(dtype))
        hidden = _FUNCTIONS[self.function](hidden)
        change = functional.linear(hidden, self.bottleneck_up.to(dtype), self.bottleneck_up_bias.to(dtype))
        scale = self.scale if self.bottleneck_scale is None else self.bottleneck_scale.to(dtype)
        return z + scale * change

    @property
    def unmerged(self) -> str | None:
        """Why the adapter cannot be merged into the weights of the base."""
        return "its networks are not linear in their inputs"

    def extra_repr(self) -> str:
        """Returns the text that ``print(model)`` shows."""
        return f"width={len(self.bottleneck_down)}, activation={self.function}, scale={self.scale:g}"


def select(model: nn.Module, adapter: BottleneckAdapter) -> Selection:
    """Returns the last linear layers of the sublayers; see :class:`ingle.adapters.kinds.Kind`."""
    return Selection(tuple(each.output for each in _sites(model, adapter)), _to_save(model, adapter))


def insert(model: nn.Module, adapter: BottleneckAdapter, selection: Selection) -> None:
    """Puts the networks into the model."""
    for site in _sites(model, adapter):
        tap = None
        if adapter.style == "parallel" and site.input is not None:
            tap = Tap(model.get_submodule(site.input))
            model.set_submodule(site.input, tap)
        base = model.get_submodule(site.output)
        layer = BottleneckLinear(
            base,
            adapter.width(features(base)[0]),
            adapter.function,
            adapter.first_scale,
            learned=adapter.scale == "learned",
            dropout=adapter.dropout,
            tap=tap,
        )
        model.set_submodule(site.output, layer.train(base.training))


def start(model: nn.Module, adapter: BottleneckAdapter, seed: int, mesh: Mesh | None) -> None:
    """Draws the first halves of the networks, and sets the second to zero."""
    for path, layer in _networks(model).items():
        layer.initialize(seed, path)


def describe(model: nn.Module, adapter: BottleneckAdapter) -> dict[str, Any]:
    """Returns the options; PEFT stops at the type."""
    options = adapter.model_dump(mode="json", include={"style", "after", "reduction", "size", "activation", "scale"})
    return {"peft_type": PEFT_TYPE, **options, "dropout": adapter.dropout}


def to_file(model: nn.Module, adapter: BottleneckAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by their keys."""
    return {key: values[path] for path, key in _names(model).items()}


def from_file(
    model: nn.Module, adapter: BottleneckAdapter, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Returns the parameters by path."""
    return by_name(tensors, _names(model), where)


def read(config: Mapping[str, Any], folder: Path) -> Adapter:
    """Refuses folders without Ingle's record.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        "The adapter's record is missing.", where=str(folder), fix="copy the complete adapter folder again"
    )


def _sites(model: nn.Module, adapter: BottleneckAdapter) -> list[Sublayer]:
    to_save, where = _to_save(model, adapter), "adapter.after"
    sites = [
        each for each in find_sublayers(model) if each.kind in adapter.sublayers and not is_inside(each.output, to_save)
    ]
    if "mlp" in adapter.sublayers and (experts := mixtures(model)):
        raise AdapterError(
            f"The MLP of {experts[0]} is a mixture of experts, which has no last linear layer.",
            where=where,
            fix="--adapter.after=[attention], or --adapter.kind=lora",
        )
    for kind in adapter.sublayers:
        if not any(each.kind == kind for each in sites):
            raise AdapterError(
                f"The layers of this model have no {kind} that ends in a linear layer.",
                where=where,
                fix="--adapter.kind=lora, or name the other sublayer",
            )
    alone = [each.output for each in sites if each.input is None]
    if adapter.style == "parallel" and alone:
        raise AdapterError(
            f"No linear layer reads what the sublayer of {alone[0]} reads.",
            where="adapter.style = parallel",
            fix="--adapter.style=pfeiffer",
        )
    return sites


def _to_save(model: nn.Module, adapter: BottleneckAdapter) -> tuple[str, ...]:
    return trained_in_full(model, adapter.trainable_modules)


def _networks(model: nn.Module) -> dict[str, BottleneckLinear]:
    return {path: each for path, each in adapted_modules(model).items() if isinstance(each, BottleneckLinear)}


def _names(model: nn.Module) -> dict[str, str]:
    return prefixed(f"{path}.{key}" for path, layer in _networks(model).items() for key in layer._parameters)
