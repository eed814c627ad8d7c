"""The value function of PPO: the reward to come at each token, read from hidden states by a head of its own.

The head reads what an adapter of its own computes on the frozen base (the role ``value``), or what the policy computes.

Legend: N tokens of the row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.config.adapter import AdapterConfig, LowRankAdapter
from ingle.config.policy import ValueConfig
from ingle.data.batch import Batch
from ingle.models import Model, forward_hidden
from ingle.objectives.scalar_head import ScalarHead, adapter_folder
from ingle.parallel import copy_rows

#: The role of the value's adapter; see :func:`ingle.adapters.add_role`.
ROLE = "value"


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
        self._path = config.path
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

    def load(self, identity: adapters.BaseIdentity | None) -> None:
        """Begins with the adapter and the head that ``objective.value.path`` names; does nothing without it.

        Raises:
            AdapterError: They do not fit the model.
        """
        if self._path is not None:
            folder = adapter_folder(self._path)
            self.head.load(folder, adapters.load_role(self.__dict__["_model"], ROLE, folder, identity=identity))

    @torch.no_grad()
    def begin_at(self, reward: float) -> None:
        """Begins with this value for every token, the mean reward of the first answers, unless a head was loaded.

        Otherwise the weights would learn the mean, and differ between tokens without a reason.
        """
        if self._path is None:
            copy_rows(self.head.bias, torch.tensor([reward]))

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Saves adapter and head; all ranks call it together. See :func:`ingle.adapters.save_role`."""
        if self._has_own_trunk:
            adapters.save_role(self.__dict__["_model"], ROLE, folder, **record)
        self.head.save(folder, record.get("mesh"))


def insert_role(model: Model, config: ValueConfig, adapter: AdapterConfig) -> None:
    """Adds the role of the values to a policy with its adapter inserted, before it is sharded.

    Raises:
        AdapterError: No layer has an adapter, or ``path`` cannot be read.
    """
    if config.trunk != "adapter":
        return
    if config.path is not None:
        shape = adapters.read_shape(adapter_folder(config.path))
    else:
        assert isinstance(adapter, LowRankAdapter), "a rule requires one"
        rank = config.rank or adapter.rank
        shape = adapters.RoleShape(rank, adapter.scale_at(rank))
    adapters.add_role(model, ROLE, rank=shape.rank, scale=shape.scale)


def make_values(model: Model, config: ValueConfig, device: torch.device) -> Values:
    """Returns the value function of a policy with :func:`insert_role`."""
    layer: Any = model.get_output_embeddings()
    return Values(model, config, ScalarHead(layer.in_features, device))
