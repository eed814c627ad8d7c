"""GaLore and APOLLO: AdamW on a projection of each matrix's gradient, so that moments take little memory.

A gradient is turned so that its smaller side is the second one, and is multiplied with a basis of that side. GaLore
multiplies the direction that Adam finds there back to the matrix. APOLLO only takes its length, as the learning rate of
each channel. The rule is applied to complete gradients: ranks that hold rows of a matrix gather its gradient, compute
the same update, and apply their rows. So the result does not depend on how a run is sharded.

Legend: L larger side of a matrix, S its smaller side, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ingle.adapters import generator_of, principal_directions
from ingle.config.optim import Apollo, GaLore, OptimConfig
from ingle.parallel import Mesh, full, local, local_rows

#: Avoids a division by zero, as in the authors' code.
_TINY = 1e-8


class LowRank:
    """The moments of all projected matrices, and their updates.

    Args:
        names: The matrices.
        rule: GaLore or APOLLO.
        config: The ``optim`` section.
        seed: Seed of random projections.
        mesh: The ranks; all call the methods together.
    """

    def __init__(
        self, names: Iterable[str], rule: GaLore | Apollo, config: OptimConfig, seed: int, mesh: Mesh | None = None
    ) -> None:
        self.names = frozenset(names)
        self._rule = rule
        self._config = config
        self._seed = seed
        self._mesh = mesh or Mesh(torch.device("cpu"))
        self._state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, name: str, master: Tensor, lr: float, weight_decay: float) -> None:
        """Updates a matrix that has a gradient. Collective for a sharded matrix."""
        if master.grad is None:
            return
        gradient_OI = full(master.grad)
        rows = local_rows(master)
        change_OI = self.change(name, gradient_OI)[rows.start : rows.stop]
        local(master).mul_(1 - lr * weight_decay).sub_(change_OI, alpha=lr)

    def change(self, name: str, gradient_OI: Tensor) -> Tensor:
        """Advances the moments of a matrix; returns the change of it at a learning rate of -1."""
        is_tall = gradient_OI.shape[0] >= gradient_OI.shape[1]
        gradient_LS = gradient_OI if is_tall else gradient_OI.t()
        state = self._state.setdefault(name, {"step": torch.zeros(())})
        basis_SR = self._basis(name, state, gradient_LS)
        projected_LR = gradient_LS @ basis_SR
        direction_LR = self._adam(state, projected_LR)
        if isinstance(self._rule, GaLore):
            change_LS = self._rule.scale * (direction_LR @ basis_SR.t())
        else:
            change_LS = self._scaled(state, gradient_LS, projected_LR, direction_LR)
        return change_LS if is_tall else change_LS.t()

    def _basis(self, name: str, state: dict[str, Tensor], gradient_LS: Tensor) -> Tensor:
        """Returns the basis of a step: the directions of the last refresh, or random ones drawn again from a seed."""
        rule, taken = self._rule, int(state["step"])
        rank, refresh = min(rule.rank, gradient_LS.shape[1]), taken // rule.update_every
        generator = generator_of(self._seed, f"{name} {refresh}")
        if isinstance(rule, Apollo):
            drawn_SR = torch.randn(gradient_LS.shape[1], rank, generator=generator)
            return drawn_SR.to(gradient_LS) / math.sqrt(rank)
        if taken % rule.update_every == 0:
            found = None
            if self._mesh.is_main:  # other machines may round differently
                _, _, directions_RS = principal_directions(gradient_LS, rank, generator)
                found = directions_RS.t().contiguous().cpu()
            state["projection"] = self._mesh.broadcast(found).to(gradient_LS.device)
        return state["projection"]

    def _adam(self, state: dict[str, Tensor], projected_LR: Tensor) -> Tensor:
        """Returns the direction of Adam's update, and advances the moments."""
        first, second = self._config.betas
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(projected_LR), torch.zeros_like(projected_LR)
        state["step"] += 1
        step = int(state["step"])
        mean, squares = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(projected_LR, 1 - first)
        squares.mul_(second).addcmul_(projected_LR, projected_LR, value=1 - second)
        scale = (squares / (1 - second**step)).sqrt_().add_(self._config.eps)
        direction: Tensor = mean / (1 - first**step) / scale
        return direction

    def _scaled(
        self, state: dict[str, Tensor], gradient_LS: Tensor, projected_LR: Tensor, direction_LR: Tensor
    ) -> Tensor:
        """Scales a gradient by APOLLO's ratio, and limits the growth of its norm."""
        rule = self._rule
        assert isinstance(rule, Apollo)
        if rule.by_channel:
            ratio = vector_norm(direction_LR, dim=1, keepdim=True) / (
                vector_norm(projected_LR, dim=1, keepdim=True) + _TINY
            )
        else:
            ratio = vector_norm(direction_LR) / (vector_norm(projected_LR) + _TINY)
        change_LS: Tensor = gradient_LS * ratio
        norm: Tensor = vector_norm(change_LS)
        if "norm" in state:
            limiter = (norm / (state["norm"] + _TINY)).clamp(min=rule.norm_growth) / rule.norm_growth
            change_LS, norm = change_LS / limiter, norm / limiter
        state["norm"] = norm
        return change_LS.mul_(math.sqrt(rule.scale))

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Returns the size of the state of one matrix."""
        small, large = sorted(shape)
        rank = min(self._rule.rank, small)
        return 4 * rank * (2 * large + small * isinstance(self._rule, GaLore))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the moments in the projected shapes, GaLore's directions and APOLLO's last norms, by flat names."""
        return {f"{key}.{name}": value for name, state in self._state.items() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit."""
        self._state = {}
        for name, device in devices.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq", "projection", "norm") if f"{key}.{name}" in state]
            if keys:
                self._state[name] = {
                    key: state[f"{key}.{name}"].to("cpu" if key == "step" else device, copy=True) for key in keys
                }
