"""Checks, after the first steps of a run, that every trained tensor has moved.

A tensor that no gradient reaches, or whose updates all round to zero, is trained in name only. Nothing else shows it:
the loss falls by the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor

from ingle.config.adapter import AdapterConfig, NoAdapter
from ingle.config.optim import OptimConfig
from ingle.errors import NotTrained
from ingle.events import Sink, Warned
from ingle.parallel import Mesh, local
from ingle.planning.selection import matches
from ingle.training.optim import Optimizer
from ingle.training.schedule import learning_rate, warmup_steps
from ingle.wording import some

#: Steps after which every tensor must have moved.
FIRST_STEPS = 10
#: AdaLoRA sets singular values of directions that it removes to zero, from which they began.
_REMOVED = "lora_E.default"
#: A prime, so that equal changes in different places do not cancel.
_PERIOD = 65521
#: Values that are read at once.
_CHUNK = 1 << 22
#: What to do about tensors without a gradient, and about those whose updates vanish.
_LEAVE_OUT = "leave them out of adapter.target_modules and adapter.trainable_modules: the model does not use them"
_RAISE = "use a larger --optim.lr"


class Movement:
    """Compares the trained tensors with what they were when the run began.

    It must be made before a checkpoint is restored. Initial values are a function of the config, so a resumed run
    compares with the same ones.

    Args:
        optimizer: Has the trained tensors.
        config: The learning rates.
        num_steps: Steps of the run.
        adapter: What is trained.
        mesh: The ranks; each compares the rows that it holds.
        idle: Tensors that the loss does not move; see :class:`ingle.objectives.StepModule`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: OptimConfig,
        num_steps: int,
        *,
        adapter: AdapterConfig,
        mesh: Mesh,
        idle: Collection[str] = (),
    ) -> None:
        self._optimizer, self._adapter, self._mesh = optimizer, adapter, mesh
        self._gradients_by = min(FIRST_STEPS, num_steps)
        # In a long warm-up, the first updates may be smaller than the spacing of float32.
        self._values_by = min(max(FIRST_STEPS, warmup_steps(config, num_steps)), num_steps)
        updates = sum(learning_rate(config, step, num_steps) > 0 for step in range(1, self._gradients_by + 1))
        # LoRA's A has no gradient in the first step, and under a value head that begins at zero, none in the second.
        self._is_long_enough = updates > 2
        masters = optimizer.named_masters()
        self._before = {name: _digest(local(master)) for name, master in masters if name not in idle}

    def check(self, step: int, sink: Sink) -> None:
        """Checks the tensors after a step; does nothing after most steps. All ranks call it together.

        Raises:
            NotTrained: A tensor has not moved.
        """
        if step not in (self._gradients_by, self._values_by) or not self._is_long_enough:
            return
        unreached = self._on_all_ranks(self._without_gradient())
        unused = self._unused(unreached)
        if unused and step == self._gradients_by:
            sink(Warned(f"No gradient reaches {len(unused)} trained tensors, which stay as they are: {some(unused)}."))
        wrong = [name for name in unreached if name not in unused]
        if wrong:
            raise _error(wrong, len(self._before), step, "no gradient reached them", _LEAVE_OUT)
        if step == self._values_by:
            resting = self._optimizer.resting()
            masters = self._optimizer.named_masters()
            watched = [(name, master) for name, master in masters if name in self._before]
            same = {name for name, master in watched if self._before[name] == _digest(local(master))} - resting
            same = {name for name in same if not name.endswith(_REMOVED)}
            unmoved = [name for name in self._on_all_ranks(same) if name not in unused]
            if unmoved:
                raise _error(unmoved, len(self._before), step, "all of their updates round to zero", _RAISE)

    def _unused(self, unreached: list[str]) -> list[str]:
        """Returns the tensors that no gradient reaches although nothing is wrong.

        An architecture has weights that an objective does not use: LED's global attention, an expert without tokens, a
        pooling layer. Of a kind of layer that is used elsewhere in the model, or that the config names, that is wrong.
        """
        if isinstance(self._adapter, NoAdapter):
            return unreached
        used = {_kind(name) for name in self._before if name not in unreached}
        return [
            name
            for name in unreached
            if used and ("expert" in name.lower() or (_kind(name) not in used and not self._is_named(name)))
        ]

    def _is_named(self, name: str) -> bool:
        """Returns whether the config names a module that has the tensor, instead of all modules of a type."""
        targets = getattr(self._adapter, "target_modules", None) or ()
        patterns = [
            *getattr(self._adapter, "trainable_modules", ()),
            *(targets if not isinstance(targets, str) else ()),
        ]
        parts = name.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(matches(module, pattern) for module in modules for pattern in patterns)

    def _without_gradient(self) -> set[str]:
        """Returns the tensors of which this rank holds no row that got a gradient."""
        state = self._optimizer.state_dict()
        names = self._before.keys() - self._optimizer.resting()
        moments = {name: state.get(f"exp_avg.{name}") for name in names}
        return {name for name, moment in moments.items() if moment is None or not bool(local(moment).any())}

    def _on_all_ranks(self, names: set[str]) -> list[str]:
        common = set.intersection(*self._mesh.gather(names))
        return [name for name in self._before if name in common]


def _kind(name: str) -> str:
    """Returns the path of a tensor's module without the numbers of layers."""
    return re.sub(r"\d+", "*", name.rpartition(".")[0])


def _error(names: list[str], total: int, step: int, why: str, fix: str) -> NotTrained:
    return NotTrained(
        f"{len(names)} of {total} trained tensors did not move in the first {step} steps.",
        where=some(names),
        why=why,
        fix=fix,
    )


@torch.no_grad()
def _digest(values: Tensor) -> int:
    """Returns a number that changes with every bit of a tensor and with the order of its values, as float32."""
    values, total = values.detach().reshape(-1), 0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK].float().view(torch.int32).long()
        places = torch.arange(start, start + len(part), device=part.device).remainder_(_PERIOD).add_(1)
        total += int(part.mul_(places).sum())
    return total
