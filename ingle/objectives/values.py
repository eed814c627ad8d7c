"""The value function of PPO: the reward to come at each token, read from hidden states by a head of its own.

The head reads what an adapter of its own computes on the frozen base (the role ``value``), or what the policy computes.

Legend: N tokens of the row, H hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.config.policy import ValueConfig
from ingle.data.batch import Batch
from ingle.models import Model, forward_hidden

#: The role of the value's adapter; see :func:`ingle.adapters.add_role`.
ROLE = "value"


class ScalarHead(nn.Module):
    """Maps hidden states to one number each, in float32.

    Args:
        size: H.
        device: Where it is.
        seed: Seed of its initial weights, drawn from N(0, 1 / (H + 1)). The bias begins at 0.

    Attributes:
        weight: float32 [1, H].
        bias: float32 [1].

    Source: Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031), detail 11.
    """

    def __init__(self, size: int, device: torch.device, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size + 1)
        self.weight = nn.Parameter(drawn.to(device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Returns a number for each token, float32 [N]."""
        return nn.functional.linear(hidden_NH.to(self.weight.dtype), self.weight, self.bias)[:, 0]


class Values(nn.Module):
    """Predicts the reward to come before the next token of each position.

    Args:
        model: The policy; with ``trunk: adapter``, it has the role ``value``.
        config: ``objective.value``.
        head: The head; it is trained.

    Attributes:
        head: As given.
        lr_ratio: Learning rate of the head and the role, as a factor on ``optim.lr``.
    """

    def __init__(self, model: Model, config: ValueConfig, head: ScalarHead) -> None:
        super().__init__()
        self.head = head
        self.lr_ratio = config.lr_ratio
        self._has_own_trunk, self._detaches = config.trunk == "adapter", config.detach
        self.__dict__["_model"] = model  # a submodule of the module around this one, and of no other

    def forward(self, batch: Batch, hidden_NH: Tensor) -> Tensor:
        """Returns the values, float32 [N].

        Args:
            batch: The tokens.
            hidden_NH: Last hidden states of the policy.
        """
        if self._has_own_trunk:
            with adapters.use(self.__dict__["_model"], ROLE):
                hidden_NH = forward_hidden(self.__dict__["_model"], batch)[0]
        elif self._detaches:
            hidden_NH = hidden_NH.detach()
        values_N: Tensor = self.head(hidden_NH)
        return values_N

    def owns(self, name: str) -> bool:
        """Returns whether a trained parameter belongs to the value function, by its name in the policy or around it."""
        return name.startswith("values.") or f".roles.{ROLE}." in name
