"""AdaLoRA's budget of ranks: which directions of all layers are kept, by their importance for the loss.

PEFT computes the layers. This allocator takes the place of PEFT's, which forgets its averages when a run is
interrupted, adds the penalty to some losses only, and fails while there is nothing to remove.

Source: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (arXiv 2303.10512), section
3 and algorithm 1; PEFT's ``RankAllocator``.

Legend: R rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ingle.adapters.peft_bridge import PeftLinear
from ingle.adapters.states import adapted_modules
from ingle.config.adapter import AdapterConfig
from ingle.config.adapter_kinds import PeftAdapter
from ingle.errors import AdapterError
from ingle.parallel import copy_rows, full

METHOD = "ADALORA"
#: PEFT's defaults.
_DEFAULTS = {"target_r": 8, "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "orth_reg_weight": 0.5}


class _Triplet(NamedTuple):
    """The factors of one layer: paths of A ``[R, I]``, E ``[R, 1]`` and B ``[O, R]``; the change is B diag(E) A."""

    a: str
    e: str
    b: str


def with_steps(adapter: AdapterConfig, num_steps: int) -> AdapterConfig:
    """Returns a section with the steps of AdaLoRA's schedule: all of them, 10 % before it and 30 % after it.

    Raises:
        AdapterError: The schedule does not fit the run.
    """
    if not isinstance(adapter, PeftAdapter) or adapter.method != METHOD:
        return adapter
    schedule = {"total_step": num_steps, "tinit": num_steps // 10, "tfinal": 3 * num_steps // 10}
    options: dict[str, Any] = {**schedule, **adapter.options}
    total, first, last = (options[key] for key in schedule)
    if not all(isinstance(each, int) and each >= 0 for each in (total, first, last)) or first + last >= total:
        raise AdapterError(
            f"AdaLoRA's schedule has no steps in which it removes ranks: {first} before, {last} after, {total} in all.",
            where="adapter.options.tinit, adapter.options.tfinal, adapter.options.total_step",
            fix="make tinit + tfinal smaller than total_step, or leave all three out",
        )
    return adapter.model_copy(update={"options": options})


class RankAllocator:
    """Removes the least important directions of all layers until the budget of ranks is met.

    A direction's importance is the average of ``|w * gradient|`` of its weights, times how much that varies.

    Args:
        model: A model with AdaLoRA inserted.
        adapter: Its section, with the steps of the schedule.
    """

    def __init__(self, model: nn.Module, adapter: PeftAdapter) -> None:
        self._parameters = dict(model.named_parameters())
        layers = [path for path, each in adapted_modules(model).items() if isinstance(each, PeftLinear)]
        self._triplets = [_Triplet(*(f"{path}.tuner.lora_{part}.default" for part in "AEB")) for path in layers]
        self._options: dict[str, Any] = {**_DEFAULTS, **adapter.options}
        self._largest = sum(self._parameters[each.a].shape[0] for each in self._triplets)
        self._target = int(self._options["target_r"]) * len(self._triplets)
        self._importance: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        for name in (name for triplet in self._triplets for name in triplet):
            self._importance[name] = torch.zeros_like(self._parameters[name], requires_grad=False)
            self._uncertainty[name] = torch.zeros_like(self._parameters[name], requires_grad=False)
        for each in self._triplets:
            self._kept[each.e] = torch.ones(self._parameters[each.e].shape, dtype=torch.float32)

    def penalize(self, gradients: Iterable[tuple[str, Tensor]]) -> float:
        """Adds the gradient of ``weight * mean(|A A^T - 1| + |B^T B - 1|)`` to those of a step; all ranks call it.

        Returns:
            The penalty.
        """
        found, weight, total = dict(gradients), float(self._options["orth_reg_weight"]), 0.0
        number = 2 * len(self._triplets)
        for each in self._triplets:
            for name in (each.a, each.b):
                if name not in found:
                    continue
                factor = full(self._parameters[name].detach()).float().requires_grad_()
                with torch.enable_grad():
                    square = factor @ factor.t() if name == each.a else factor.t() @ factor
                    norm = (square - torch.eye(len(square), device=square.device)).norm() * weight / number
                    (gradient,) = torch.autograd.grad(norm, factor)
                own = torch.zeros_like(found[name])
                copy_rows(own, gradient)
                found[name].add_(own)
                total += float(norm.detach())
        return total

    def observe(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Keeps the gradients of a step, after they were clipped and before the update."""
        self._gradients = {name: gradient for name, gradient in gradients if name in self._importance}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Measures the importance after a step (1-based), and removes what the budget does not allow."""
        end = int(self._options["total_step"]) - int(self._options["tfinal"])
        if step < end:
            self._measure()
            if step > int(self._options["tinit"]) and step % int(self._options["deltaT"]) == 0:
                self._select(self.budget(step))
                self._apply()
        elif step == end:
            self._select(self._target)
            self._apply()
        else:
            self._apply()
        self._gradients = {}

    def budget(self, step: int) -> int:
        """Returns the number of directions that all layers together may have after a step."""
        first, last = int(self._options["tinit"]), int(self._options["tfinal"])
        if step <= first:
            return self._largest
        rest = max(0.0, 1 - (step - first) / (int(self._options["total_step"]) - last - first))
        return int((self._largest - self._target) * rest**3 + self._target)

    def ranks(self) -> dict[str, int]:
        """Returns the number of directions of each layer that are kept, by path."""
        return {name.split(".tuner.")[0]: int(kept.sum()) for name, kept in self._kept.items()}

    def _measure(self) -> None:
        fast, slow = float(self._options["beta1"]), float(self._options["beta2"])
        for name, gradient in self._gradients.items():
            now = (self._parameters[name].detach() * gradient).abs()
            importance, uncertainty = self._importance[name], self._uncertainty[name]
            importance.mul_(fast).add_(now, alpha=1 - fast)
            uncertainty.mul_(slow).add_((now - importance).abs(), alpha=1 - slow)

    def _select(self, budget: int) -> None:
        """Chooses the most important directions."""
        removed = self._largest - budget
        if removed <= 0:
            return
        scores = {each.e: self._score(each) for each in self._triplets}
        threshold = torch.cat([score.view(-1) for score in scores.values()]).kthvalue(removed).values
        for name, score in scores.items():
            self._kept[name].copy_((score > threshold).float())

    def _score(self, each: _Triplet) -> Tensor:
        """Returns the importance of the directions of a layer, ``[R, 1]``."""
        a, e, b = (full(self._importance[name] * self._uncertainty[name]) for name in each)
        return e + (a.mean(1) + b.mean(0))[:, None]

    def _apply(self) -> None:
        for name, kept in self._kept.items():
            parameter = self._parameters[name]
            copy_rows(parameter, full(parameter.detach()) * kept.to(parameter.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns averages and kept directions."""
        return {
            **{f"importance.{name}": value for name, value in self._importance.items()},
            **{f"uncertainty.{name}": value for name, value in self._uncertainty.items()},
            **{f"kept.{name}": value for name, value in self._kept.items()},
        }

    def like(self, name: str) -> Tensor | None:
        """Returns the tensor that is sharded like the one of this name."""
        return self.state_dict().get(name)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def make_allocator(model: nn.Module, adapter: AdapterConfig) -> RankAllocator | None:
    """Returns the allocator of AdaLoRA; None for other adapters."""
    if not isinstance(adapter, PeftAdapter) or adapter.method != METHOD:
        return None
    return RankAllocator(model, adapter)
