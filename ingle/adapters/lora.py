"""The LoRA module: a frozen linear map of any base format and its low-rank change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ingle.kernels.layers.lora import Projection, lora_linears, spread
from ingle.quant.conversion import is_conv1d
from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear


@dataclass(frozen=True)
class Merged:
    """A merged weight, packed.

    Attributes:
        format: What the planes mean.
        planes: As the format lists them.
    """

    format: Format
    planes: Mapping[str, Tensor]

    def decode(self, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] in the format's scratch; valid until the next is asked for."""
        out = self.format.scratch.take((out_features, in_features), dtype, next(iter(self.planes.values())).device)
        return self.format.decode(self.planes, out_features, in_features, dtype, out)


class LoraLinear(nn.Module):
    """``y = x W^T + b + scale * dropout(pool(x)) A^T B^T`` with W and b frozen.

    A and B are float32 masters; products run in the dtype of the base.  ``pool`` sums groups of neighbours; in plain
    LoRA a group is one input.  With larger ones (QA-LoRA) all inputs of a group share their column of A, so that the
    change is constant in the group.

    Args:
        base: An ``nn.Linear``, transformers' ``Conv1D`` or a ``QuantLinear``; frozen by this.
        rank: R.
        scale: Factor on the change.
        dropout: Share of the adapter's inputs set to zero in training.
        group_size: Neighbouring inputs that share a column of A; the last group of a row may be smaller.

    Attributes:
        lora_a: [R, ceil(in_features / group_size)].
        lora_b: [out_features, R].
        enabled: Whether the change is applied.
        merged: Planes of the merged weight and their format; while they are there, it is they that are multiplied
            with, and gradients go straight through their rounding.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3; Xu et al. 2023, "QA-LoRA" (arXiv 2309.14717),
    section 3.3, where pool is the mean. With the sum, A is the A of plain LoRA with equal columns, and so alpha and the
    learning rate mean what they mean there.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, *, group_size: int = 1) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = features(base)
        self.scale = scale
        self.dropout = dropout
        self.group_size = group_size
        self.enabled = True
        self.merged: Merged | None = None
        device = next(base.parameters()).device
        if device.type == "meta":  # an adapter is small: it has its bytes even where its base has none
            device = torch.device("cpu")
        num_groups = -(-self.in_features // group_size)
        self.lora_a = nn.Parameter(torch.empty(rank, num_groups, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base's weight, as architectures that look at their layers expect it."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @torch.no_grad()
    def initialise(self, seed: int, name: str) -> None:
        """Sets A uniform in ``+-1/sqrt(in_features)`` and B zero, so that training starts from the base.

        Args:
            seed: The run's.
            name: The module's path: what is drawn depends on it and not on the order of modules.

        Source: He et al. 2015 (arXiv 1502.01852) with a = sqrt(5), as in the authors' code for LoRA.
        """
        digest = hashlib.blake2b(f"{seed}.{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        bound = 1 / math.sqrt(self.in_features)
        self.lora_a.copy_(torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator))
        self.lora_b.zero_()

    def delta(self) -> Tensor:
        """``scale * B A``, float32, [out_features, groups]: what every weight of a group grows by."""
        return (self.lora_b.detach() @ self.lora_a.detach()).mul_(self.scale)

    def spread(self, values: Tensor) -> Tensor:
        """``[..., groups]`` to ``[..., in_features]``: each value for all inputs of its group."""
        return spread(values, self.group_size, self.in_features)

    def projection(self) -> Projection:
        """What the kernels need to know."""
        if not self.enabled:
            return Projection(self.dense_weight, self.bias, None, None)
        if self.merged is None:
            dropout = self.dropout if self.training else 0.0
            return Projection(
                self.dense_weight, self.bias, self.lora_a, self.lora_b, self.scale, dropout, self.group_size
            )
        weight = partial(self.merged.decode, self.out_features, self.in_features)
        if not torch.is_grad_enabled():
            return Projection(weight, self.bias, None, None)
        return Projection(
            weight, self.bias, self.lora_a, self.lora_b, self.scale, group_size=self.group_size, holds_change=True
        )

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The base's weight as [out_features, in_features]; valid until the next layer's is asked for."""
        if isinstance(self.base, QuantLinear):
            return self.base.decode(dtype, self.base.scratch(dtype))
        weight = self.weight.detach()
        return (weight.t() if is_conv1d(self.base) else weight).to(dtype)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the base multiplies ``x``."""
        return x.dtype if isinstance(self.base, QuantLinear) else self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        x = x.to(self.product_dtype(x))
        if not self.enabled:
            output: Tensor = self.base(x)
            return output
        return lora_linears(x, [self.projection()])[0]

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        groups = f", group_size={self.group_size}" if self.group_size > 1 else ""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}{groups}"


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can sit on a module: ``nn.Linear``, ``Conv1D`` or ``QuantLinear``.

    A subclass with a ``forward`` of its own (Phi-3.5-MoE's router) computes something else, and is none.
    """
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return linear or isinstance(module, QuantLinear) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """``out_features, in_features`` of a linear-like module."""
    if is_conv1d(module):
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
