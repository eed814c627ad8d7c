"""A model's weights one after the other: each is held as training holds it, handed out, and let go.

Export reads a model this way, so that no more than one tensor of it is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.config.base import BaseConfig
from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.models.loading.architecture import build, meta_model
from ingle.models.loading.gguf_model import convert_base
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.placement import Destination, leaf_of
from ingle.models.loading.reading_plan import Converted, Experts, Group, Plain, QuantizedWeight
from ingle.models.loading.safetensors_files import StoredTensor
from ingle.models.loading.weights import plan_weights, read_group


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a parameter under the name that they have on disk.

    Attributes:
        key: The hub's name.
        shape: Of the tensor on disk, unpacked.
    """

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of a checkpoint.

    Attributes:
        name: The parameter's in the model.
        pieces: What it is on disk; for fused experts those of every expert, one after the other.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def num_weights(self) -> int:
        """Logical weights."""
        return sum(prod(piece.shape) for piece in self.pieces)


class Stream:
    """A checkpoint in the form a run trained on, without its bytes.

    Args:
        config: Which model.
        base: The format of its weights.
        dtype: Its compute type.

    Attributes:
        model: The model on the meta device; adapters may be put on it.
        entries: Its parameters that are in the files, in the order they are read.

    Raises:
        ModelError: When it cannot be found, read, supported, or taken apart again.
        QuantizationError: When a weight cannot be held in the format.
    """

    def __init__(self, config: ModelConfig, base: BaseConfig, dtype: torch.dtype) -> None:
        self.model: PreTrainedModel = meta_model(config, "cpu", dtype)
        convert_base(self.model, config, base)
        self._twin = build(self.model.config, dtype, trust_remote_code=config.trust_remote_code)
        plan, self._folder = plan_weights(self.model, config, self._twin)
        self._keys = {id(entry): key for key, entry in plan.stored.items()}
        self._plan = plan  # keeps what the identities above stand for
        groups = plan.groups
        self._groups = {group.target: group for group in groups}
        self._destination = Destination(self.model, self._twin, torch.device("cpu"), empty=True)
        self.entries = tuple(Entry(group.target, self._pieces(group)) for group in groups)

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        """The module that holds a parameter, filled while the block runs."""
        with self._destination.room(name) as module:
            read_group(self._groups[name], self._destination, self._twin, self._folder)
            yield module

    def holder(self, name: str) -> nn.Module:
        """The module that holds a parameter: a packed one, or the one whose parameter it is; without bytes."""
        return self._destination.holder(name)

    def _pieces(self, group: Group) -> tuple[Piece, ...]:
        match group:
            case Plain():
                return (self._piece(group.stored),)
            case QuantizedWeight():
                shape = tuple(self._twin.state_dict()[group.target].shape)
                codes = group.parts.get("weight") or group.parts["W_q"]
                return (Piece(self._keys[id(codes)], shape),)
            case GgufWeight():
                return (Piece(group.target, group.tensor.shape),)
            case Experts():
                return tuple(self._piece(part) for parts in group.parts for part in parts)
            case Converted():
                raise ModelError(
                    f"{type(self.model).__name__} cannot be written in its files' layout yet.",
                    where=group.target,
                    why="transformers converts this weight while it loads, in a way that is not undone here",
                    fix="export the adapter alone: --to peft",
                )

    def _piece(self, stored: StoredTensor) -> Piece:
        return Piece(self._keys[id(stored)], stored.shape)


def plain_value(module: nn.Module, name: str) -> Tensor:
    """The value of a parameter or buffer that is not packed."""
    value: Tensor = getattr(module, leaf_of(name))
    return value.detach()
