"""Training in a random subspace: all weights move together along a few directions.

``W_i = W0_i + gain_i * P_i z`` for each tensor i. Trained are z, which begins at zero, and with SAID the gains, which
begin at one. P comes from a seed. Gradients of weights are mapped to those of z as soon as autograd has computed them,
so they do not add up in memory.

Source: Aghajanyan et al. 2020 (arXiv 2012.13255), equations 2 and 3. The authors' gradient of Fastfood lacks a factor,
which Adam hides; here it is the adjoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ingle.config.optim import OptimConfig, Subspace
from ingle.parallel import Mesh
from ingle.training.optim import Optimizer, ParameterGroup
from ingle.training.projections import Fastfood, IndexMap, Projection

#: Names of the trained tensors.
COORDINATES, GAINS = "subspace.coordinates", "subspace.gains"


class SubspaceOptimizer(Optimizer):
    """AdamW on the coordinates of a subspace through the initial weights.

    Args:
        parameters: Name and initial value of every tensor that moves.
        config: The ``optim`` section.
        rule: Its rule.
        projection: ``fastfood`` or ``index``.
        mesh: The ranks, each with all weights.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        config: OptimConfig,
        rule: Subspace,
        projection: str,
        mesh: Mesh | None = None,
    ) -> None:
        self._moved = [parameter for _, parameter in parameters]
        self._start = [parameter.detach().clone() for parameter in self._moved]
        sizes = [parameter.numel() for parameter in self._moved]
        kind = Fastfood if projection == "fastfood" else IndexMap
        self._projection: Projection = kind(sizes, rule.dim, rule.seed)
        device = self._moved[0].device
        dtype = torch.promote_types(self._moved[0].dtype, torch.float32)
        self._z_d = nn.Parameter(torch.zeros(rule.dim, dtype=dtype, device=device))
        self._gains = nn.Parameter(torch.ones(len(sizes), dtype=dtype, device=device)) if rule.gains else None
        trained = [(COORDINATES, self._z_d)] + ([(GAINS, self._gains)] if self._gains is not None else [])
        super().__init__([ParameterGroup(tuple(trained), 1.0, 0.0)], config, mesh)
        for index, parameter in enumerate(self._moved):
            parameter.register_post_accumulate_grad_hook(lambda parameter, index=index: self._pull(index, parameter))

    def clear(self) -> None:
        """Clears all gradients."""
        super().clear()
        for parameter in self._moved:
            parameter.grad = None

    def step(self, lr: float) -> None:
        """Updates the coordinates, and the weights from them."""
        super().step(lr)
        self._push()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit; initial weights are a function of the config."""
        super().load_state_dict(state)
        self._push()

    @torch.no_grad()
    def _push(self) -> None:
        for index, (parameter, start) in enumerate(zip(self._moved, self._start, strict=True)):
            change = self._projection.apply(index, self._z_d.detach())
            if self._gains is not None:
                change = change * self._gains[index]
            parameter.copy_((start.reshape(-1) + change).view_as(parameter))

    @torch.no_grad()
    def _pull(self, index: int, parameter: Tensor) -> None:
        """Adds the gradient of a tensor to those of the coordinates and of its gain."""
        assert parameter.grad is not None
        gradient_D = parameter.grad.reshape(-1).to(self._z_d.dtype)
        parameter.grad = None
        mapped_d = self._projection.adjoint(index, gradient_D)
        if self._gains is not None:
            if self._gains.grad is None:
                self._gains.grad = torch.zeros_like(self._gains)
            self._gains.grad[index] += mapped_d @ self._z_d
            mapped_d = mapped_d * self._gains[index]
        self._z_d.grad = mapped_d if self._z_d.grad is None else self._z_d.grad.add_(mapped_d)
