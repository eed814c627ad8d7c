"""AdamW over float32 master weights, and the interface of every optimizer.

Trainable parameters may be bfloat16 (full fine-tuning, trained embeddings). An update is often smaller than the spacing
of bfloat16 and would be lost, and accumulating gradients in bfloat16 would make the result depend on how a batch is
split. So every bfloat16 parameter has a float32 master: gradients are added to the gradient of the master as soon as
autograd has computed them, the optimizer updates the master, and the parameter is the rounded master. A float32
parameter is its own master.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2;
Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ingle.config.optim import OptimConfig
from ingle.parallel import Mesh, local, sum_gradients, total_norm
from ingle.training.low_rank import LowRank


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        parameters: Name in the model and parameter, in the order of the model.
        lr_ratio: Their learning rate divided by ``optim.lr``.
        weight_decay: Their decoupled weight decay.
    """

    parameters: tuple[tuple[str, nn.Parameter], ...]
    lr_ratio: float
    weight_decay: float


class Optimizer:
    """AdamW with gradient clipping and master weights.

    Args:
        groups: The trained parameters.
        config: The ``optim`` section.
        mesh: The ranks of the run; all call the methods together. None for one process.
        low_rank: Updates some of the matrices in place of AdamW.
        precondition: Functions of gradients after clipping, by the name of the parameter.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: OptimConfig,
        mesh: Mesh | None = None,
        *,
        low_rank: LowRank | None = None,
        precondition: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self._config = config
        self._mesh = mesh or Mesh(torch.device("cpu"))
        self._groups = list(groups)
        self._parameters = {name: parameter for group in groups for name, parameter in group.parameters}
        self._masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        self._low_rank = low_rank
        self._precondition = precondition or {}
        self._projected = frozenset[str]() if low_rank is None else low_rank.names
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [self._masters[name] for name, _ in group.parameters if name not in self._projected],
                    "lr": 0.0,  # each step sets it
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_accumulate_into(self._masters[name]))
            for name, parameter in self._parameters.items()
            if self._masters[name] is not parameter
        ]

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the largest state that :meth:`state_dict` returns in a run."""
        plain = sum((2 * (name not in self._projected) + 1) * master.nbytes for name, master in self._masters.items())
        if self._low_rank is None:
            return plain
        return plain + sum(self._low_rank.state_bytes(self._masters[name].shape) for name in self._projected)

    def begin(self, step: int) -> None:
        """Prepares for a step, before its gradients are computed."""

    def resting(self) -> frozenset[str]:
        """Returns the parameters that are not trained at the moment."""
        return frozenset()

    def named_masters(self) -> Iterable[tuple[str, Tensor]]:
        """Returns name and float32 master of every trained parameter."""
        return self._masters.items()

    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        """Yields name and float32 gradient of every parameter that has one."""
        for name, master in self._masters.items():
            if master.grad is not None:
                yield name, master.grad

    def sum_gradients(self) -> None:
        """Adds the gradients of all ranks, after the last backward pass of a step.

        FSDP has added those of sharded parameters already.
        """
        sum_gradients(self._masters.values(), self._mesh)

    def clip(self) -> float:
        """Scales all gradients down if their norm exceeds ``optim.max_grad_norm``.

        Returns:
            Their L2 norm before clipping, equal on all ranks.
        """
        gradients = [gradient for _, gradient in self.gradients()]
        if not gradients:
            return 0.0
        norm = total_norm(gradients, self._mesh)
        if self._config.max_grad_norm is not None:
            factor = (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return float(norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates the parameters. Their gradients stay readable until :meth:`clear`.

        Args:
            lr: Learning rate of a group whose ``lr_ratio`` is 1.
        """
        for name, change in self._precondition.items():
            if (gradient := self._masters[name].grad) is not None:
                self._masters[name].grad = change(gradient)
        for group, options in zip(self._groups, self._adamw.param_groups, strict=True):
            options["lr"] = lr * group.lr_ratio
            for name, _ in group.parameters:
                if self._low_rank is not None and name in self._projected:
                    self._low_rank.update(name, self._masters[name], lr * group.lr_ratio, group.weight_decay)
        self._adamw.step()
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def clear(self) -> None:
        """Clears all gradients: those of a completed step, or of one that was given up."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._masters[name].grad = None

    def like(self, name: str) -> Tensor | None:
        """Returns the tensor that is sharded like the one of this name in the state."""
        kind, _, parameter = name.partition(".")
        is_alike = kind == "master" or (kind in ("exp_avg", "exp_avg_sq") and parameter not in self._projected)
        return self._masters.get(parameter) if is_alike else None

    def state_dict(self) -> dict[str, Any]:
        """Returns masters and moments under flat names, as safetensors stores them."""
        state: dict[str, Any] = {} if self._low_rank is None else self._low_rank.state_dict()
        for name, master in self._masters.items():
            state[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                state[f"{key}.{name}"] = value.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit."""
        if self._low_rank is not None:
            self._low_rank.load_state_dict(state, {name: self._masters[name].device for name in self._projected})
        for name, master in self._masters.items():
            master.copy_(state[f"master.{name}"])
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)
            if name in self._projected:
                continue
            moments = {
                key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in state
            }
            if moments:
                self._adamw.state[master] = {key: value.to(master.device, copy=True) for key, value in moments.items()}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype.itemsize >= 4:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _accumulate_into(master: nn.Parameter):  # type: ignore[no-untyped-def]
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return move
