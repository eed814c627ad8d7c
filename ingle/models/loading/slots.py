"""Maps names of the architecture to places in a model.

The model may have a quantized module where the architecture has a linear layer, an embedding or a stack of experts, and
an adapter may wrap any of them. Only this module knows how the two correspond.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.quant.linear import QuantModule


@dataclass(slots=True)
class Slot:
    """The place of a parameter or buffer.

    Attributes:
        name: Its name in the architecture.
        wanted: The architecture's tensor on the meta device.
        owner: The module that owns the name.
        quantized: The module that stores it quantized: the owner, or the owner's child for a stack of experts.
    """

    name: str
    wanted: Tensor
    owner: nn.Module
    quantized: QuantModule | None

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return leaf_of(self.name)

    @property
    def is_buffer(self) -> bool:
        """Whether the name is that of a buffer of the owner."""
        return self.leaf in self.owner._buffers

    @property
    def matrix(self) -> QuantModule | None:
        """The quantized module if it stores a single matrix; None for a stack."""
        return self.quantized if self.quantized is not None and self.quantized.num_stacked is None else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that store the value, by their key in the module; empty for a buffer."""
        if self.quantized is not None:
            return {key: self.quantized.get_parameter(key) for key in self.quantized.specs}
        parameter = self.owner._parameters.get(self.leaf)
        return {} if parameter is None else {self.leaf: parameter}

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Returns the dtype of the full value of a parameter, whose shard may be its float32 master."""
        return parameter.dtype if self.quantized is not None else self.wanted.dtype

    def require_shape(self, have: tuple[int, ...], want: tuple[int, ...] | None = None, part: str = "") -> None:
        """Refuses a value whose shape is not ``want``, by default the architecture's.

        Raises:
            ModelError: It names both shapes.
        """
        want = tuple(self.wanted.shape if want is None else want)
        if tuple(have) != want:
            raise ModelError(
                f"The weight {self.name}{part} does not have the shape that the model needs.",
                where=self.name,
                why=f"{tuple(have)} in the file, {want} in the architecture",
                fix="check that the files belong to this config.json",
            )


def find_slots(model: PreTrainedModel, architecture: PreTrainedModel) -> dict[str, Slot]:
    """Returns the place in a model of every parameter and buffer of its architecture."""
    slots: dict[str, Slot] = {}
    for name, wanted in {**architecture.state_dict(), **dict(architecture.named_buffers())}.items():
        owner = _find_owner(name, model, architecture)
        child = owner._modules.get(leaf_of(name), owner if leaf_of(name) == "weight" else None)
        slots[name] = Slot(name, wanted, owner, child if isinstance(child, QuantModule) else None)
    return slots


def leaf_of(name: str) -> str:
    """Returns the last part of a parameter's path."""
    return name.rpartition(".")[2]


def _find_owner(name: str, model: nn.Module, architecture: nn.Module) -> nn.Module:
    """Returns the module that owns a name, inside any adapter that wraps it."""
    for part in name.split(".")[:-1]:
        model, architecture = getattr(model, part), getattr(architecture, part)
        while type(model) is not type(architecture) and isinstance(inner := getattr(model, "base", None), nn.Module):
            model = inner
    return model
