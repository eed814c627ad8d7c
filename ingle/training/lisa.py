"""LISA: AdamW on a few layers at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ingle.adapters import generator_of
from ingle.config.optim import Lisa, OptimConfig
from ingle.parallel import Mesh
from ingle.training.optim import Optimizer, ParameterGroup

#: Value of the state: which draw of layers is trained.
_PERIOD = "period"


class LayerSampling(Optimizer):
    """AdamW on what is outside of the layers, and on some layers that are drawn again and again.

    Weights of other layers need no gradient, master or moments, so they take memory for the drawn layers only. A layer
    that leaves keeps its weights in the dtype of the model. What stays in keeps its master and moments.

    Args:
        groups: All parameters.
        config: The ``optim`` section.
        rule: Its rule.
        layer_of: Number of the layer of each parameter that is inside of one.
        seed: Seed of the draws.
        mesh: The ranks, each with all weights.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: OptimConfig,
        rule: Lisa,
        layer_of: Mapping[str, int],
        seed: int,
        mesh: Mesh | None = None,
    ) -> None:
        self._rule, self._layer_of, self._seed = rule, layer_of, seed
        self._num_layers = len(set(layer_of.values()))
        self._every_group, self._period, self._num_updates = list(groups), -1, 0
        self._everything = {name: parameter for group in groups for name, parameter in group.parameters}
        super().__init__([_only(group, self._everything.keys() - layer_of.keys()) for group in groups], config, mesh)
        for name in layer_of:
            self._everything[name].requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Number of parameters that are trained in the course of a run."""
        return sum(parameter.numel() for parameter in self._everything.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the largest state that :meth:`state_dict` returns in a run."""
        sizes: dict[int, int] = {}
        for name, layer in self._layer_of.items():
            sizes[layer] = sizes.get(layer, 0) + self._everything[name].numel()
        drawn = sorted(sizes.values())[-self._rule.active :]
        always = sum(p.numel() for name, p in self._everything.items() if name not in self._layer_of)
        return 12 * (always + sum(drawn)) + sum(self._everything[name].nbytes for name in self._layer_of)

    def begin(self, step: int) -> None:
        """Draws layers again at the first step of each period."""
        self._activate((step - 1) // self._rule.every)

    def draw(self, period: int) -> list[int]:
        """Returns the layers that are trained in a period, counted from 0."""
        generator = generator_of(self._seed, f"layers of period {period}")
        return sorted(torch.randperm(self._num_layers, generator=generator)[: self._rule.active].tolist())

    def resting(self) -> frozenset[str]:
        """Returns the parameters of layers that are not drawn, or have had no two updates since they were drawn."""
        trained = self._parameters.keys() if self._num_updates > 1 else self._parameters.keys() - self._layer_of.keys()
        return frozenset(self._everything.keys() - trained)

    def step(self, lr: float) -> None:
        """Updates what is trained."""
        super().step(lr)
        self._num_updates += lr > 0

    def named_masters(self) -> Any:
        """Returns name and value of every parameter, of those that rest in the dtype of the model."""
        return ((name, self._masters.get(name, parameter)) for name, parameter in self._everything.items())

    def state_dict(self) -> dict[str, Any]:
        """Returns masters and moments of what is trained, the weights of what rests, and the period."""
        rest = {f"master.{name}": parameter.detach() for name, parameter in self._everything.items()}
        return {**rest, **super().state_dict(), _PERIOD: self._period}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit."""
        self._activate(int(state[_PERIOD]))
        super().load_state_dict(state)
        for name in self._everything.keys() - self._parameters.keys():
            self._everything[name].copy_(state[f"master.{name}"])

    def _activate(self, period: int) -> None:
        """Trains the layers of a period, and those outside of the layers alone before the first one."""
        if period == self._period:
            return
        drawn = set(self.draw(period)) if period >= 0 else set[int]()
        names = {name for name in self._everything if self._layer_of.get(name, -1) in {-1, *drawn}}
        kept = {name: (self._masters[name], self._adamw.state.get(self._masters[name])) for name in self._masters}
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self._everything.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        Optimizer.__init__(self, [_only(group, names) for group in self._every_group], self._config, self._mesh)
        self._period, self._num_updates = period, 0
        self._carry_over({name: found for name, found in kept.items() if name in names})

    @torch.no_grad()
    def _carry_over(self, kept: Mapping[str, tuple[Tensor, dict[str, Any] | None]]) -> None:
        for name, (master, moments) in kept.items():
            self._masters[name].copy_(master)
            if moments:
                self._adamw.state[self._masters[name]] = moments


def _only(group: ParameterGroup, names: Any) -> ParameterGroup:
    return replace(group, parameters=tuple((name, parameter) for name, parameter in group.parameters if name in names))
