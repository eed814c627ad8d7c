"""LoRA for a frozen linear layer of any base format."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ingle.adapters.linear import AdaptedLinear
from ingle.kernels.layers.lora import Projection, lora_linears
from ingle.parallel import copy_rows, local
from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear


@dataclass(frozen=True)
class Merged:
    """A merged and quantized weight.

    Attributes:
        format: Format of the planes.
        planes: Planes by name.
    """

    format: Format
    planes: Mapping[str, Tensor]

    def decode(self, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
        """Decodes ``[out_features, in_features]`` into the format's scratch buffer, which the next call overwrites."""
        out = self.format.scratch.take((out_features, in_features), dtype, next(iter(self.planes.values())).device)
        return self.format.decode(self.planes, out_features, in_features, dtype, out)


class Role(nn.Module):
    """A and B of another function over the same base: the value of a policy, or a reward.

    Attributes:
        lora_a: ``[R, in_features]``, float32.
        lora_b: ``[out_features, R]``, float32.
        scale: Factor on the change.
    """

    def __init__(self, out_features: int, in_features: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.scale = scale

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draws A as :meth:`LoraLinear.initialize` does and sets B to zero."""
        bound = 1 / math.sqrt(self.lora_a.shape[1])
        copy_rows(self.lora_a, torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator))
        local(self.lora_b).zero_()


class LoraLinear(AdaptedLinear):
    """``y = x W^T + b + scale * dropout(pool(x)) A^T B^T`` with W and b frozen.

    A and B are float32 masters; products run in the dtype of the base.  ``pool`` sums groups of neighboring inputs.
    In plain LoRA a group is one input.  In QA-LoRA all inputs of a larger group share a column of A, so the change is
    constant within the group.

    Args:
        base: An ``nn.Linear``, transformers' ``Conv1D`` or a ``QuantLinear``.  It is frozen.
        rank: Rank R of the change.
        scale: Factor on the change.
        dropout: Share of the adapter's inputs that are set to zero in training.
        group_size: Number of neighboring inputs that share a column of A; the last group of a row may be smaller.
        subtracts: Whether the change that A and B begin with is subtracted.
        has_magnitude: Whether the lengths of the rows are trained apart (DoRA).

    Attributes:
        lora_a: ``[R, ceil(in_features / group_size)]``.
        lora_b: ``[out_features, R]``.
        initial_a: The A that is subtracted, frozen; or None.
        initial_b: Its B.
        magnitude: m of DoRA, ``[out_features]``; or None.
        norm: n of DoRA, the lengths of the rows of ``W + scale * B A``, see :func:`ingle.adapters.norms.update_norms`.
        roles: A and B of other functions by name, see :func:`ingle.adapters.add_role`.
        merged: The merged weight, or None.  If it is set, the layer multiplies by it, and gradients pass straight
            through its rounding.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3; Xu et al. 2023, "QA-LoRA" (arXiv 2309.14717),
    section 3.3, where pool is the mean.  With the sum, A equals the A of plain LoRA with equal columns, so alpha and
    the learning rate keep their meaning.  Liu et al. 2024, "DoRA" (arXiv 2402.09353), equation 5.
    """

    initial_a: nn.Parameter | None
    initial_b: nn.Parameter | None
    magnitude: nn.Parameter | None
    norm: Tensor
    roles: nn.ModuleDict | None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        *,
        group_size: int = 1,
        subtracts: bool = False,
        has_magnitude: bool = False,
    ) -> None:
        super().__init__(base)
        self.scale = scale
        self.dropout = dropout
        self.group_size = group_size
        self.merged: Merged | None = None
        self.roles = None
        device = self.own_device()
        num_groups = -(-self.in_features // group_size)
        self.lora_a = nn.Parameter(torch.empty(rank, num_groups, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        self.initial_a = self.initial_b = self.magnitude = None
        if subtracts:
            self.initial_a, self.initial_b = (
                nn.Parameter(torch.zeros_like(factor), requires_grad=False) for factor in (self.lora_a, self.lora_b)
            )
        if has_magnitude:
            self.magnitude = nn.Parameter(torch.ones(self.out_features, dtype=torch.float32, device=device))
            self.register_buffer("norm", torch.ones_like(self.magnitude, requires_grad=False), persistent=False)

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.lora_a.shape[0]

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """Draws A uniformly from ``+-1/sqrt(in_features)`` and sets B to zero, so training starts from the base.

        Args:
            seed: Seed of the run.
            name: Path of the module.  The draw depends on it and not on the order of modules.

        Source: He et al. 2015 (arXiv 1502.01852) with a = sqrt(5), as in the authors' code for LoRA.
        """
        generator = generator_of(seed, name)
        bound = 1 / math.sqrt(self.in_features)
        copy_rows(self.lora_a, torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator))
        local(self.lora_b).zero_()

    def add_role(self, name: str, rank: int, scale: float) -> Role:
        """Adds A and B of another function."""
        role = Role(self.out_features, self.in_features, rank, scale, self.lora_a.device)
        if self.roles is None:
            self.roles = nn.ModuleDict()
        self.roles[name] = role
        return role

    def named_roles(self) -> Iterator[tuple[str, Role]]:
        """Yields name, A and B of other functions."""
        for name, role in self.roles.items() if self.roles is not None else ():
            assert isinstance(role, Role)
            yield name, role

    def has_role(self, name: str) -> bool:
        """Returns whether the layer has A and B of a function."""
        return self.roles is not None and name in self.roles

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns the A and B of the complete change: those that are trained, and those that are subtracted."""
        if self.initial_a is None or self.initial_b is None:
            return self.lora_a, self.lora_b
        return torch.cat([self.lora_a, self.initial_a]), torch.cat([self.lora_b, -self.initial_b], dim=1)

    def delta(self) -> Tensor:
        """Returns the change of every weight of a group, ``scale * B A``, float32 ``[out_features, groups]``.

        A magnitude changes the weights further, see :func:`ingle.adapters.merging.merged_weight`.
        """
        a, b = self.factors()
        return (b.detach() @ a.detach()).mul_(self.scale)

    @property
    def obstacle(self) -> None:
        """The layer can be part of a fused one."""
        return None

    def projection(self) -> Projection:
        """Returns the arguments of the LoRA kernels."""
        product = self.base.multiply if isinstance(self.base, QuantLinear) else None
        if not self.is_on:
            return Projection(self.dense_weight, self.bias, None, None, product=product)
        if self.role is not None:
            role = dict(self.named_roles())[self.role]
            return Projection(self.dense_weight, self.bias, role.lora_a, role.lora_b, role.scale, product=product)
        if self.merged is None or self.is_initial:
            dropout = self.dropout if self.training else 0.0
            factors = *self.factors(), self.scale, dropout, self.group_size
            gain = None if self.magnitude is None else self.magnitude / self.norm
            return Projection(self.dense_weight, self.bias, *factors, product=product, gain=gain)
        weight = partial(self.merged.decode, self.out_features, self.in_features)
        if not torch.is_grad_enabled():
            return Projection(weight, self.bias, None, None)
        return Projection(
            weight, self.bias, self.lora_a, self.lora_b, self.scale, group_size=self.group_size, holds_change=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in_features]`` to ``[..., out_features]``."""
        x = x.to(self.product_dtype(x))
        if not self.is_on:
            output: Tensor = self.base(x)
            return output
        return lora_linears(x, [self.projection()])[0]

    def extra_repr(self) -> str:
        """Returns the text that ``print(model)`` shows."""
        groups = f", group_size={self.group_size}" if self.group_size > 1 else ""
        more = ", subtracts" if self.initial_a is not None else ""
        more += ", magnitude" if self.magnitude is not None else ""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}{groups}{more}"


def generator_of(seed: int, name: str) -> torch.Generator:
    """Returns the random numbers of one module."""
    digest = hashlib.blake2b(f"{seed}.{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
