"""Streams a model's weights: each is loaded in the base format of a run, yielded, and freed.

Export reads a model this way, so that only one parameter is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.config.base import BaseConfig, NoBase
from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.models.kinds import ModelTask
from ingle.models.loading.gguf_model import convert_base
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.meta_device import build, meta_model
from ingle.models.loading.reading_plan import Converted, Experts, Group, Plain, QuantizedWeight
from ingle.models.loading.safetensors_files import StoredTensor
from ingle.models.loading.slots import leaf_of
from ingle.models.loading.weight_loading import plan_weights, read_group, without_other_heads
from ingle.models.loading.weight_writer import WeightWriter
from ingle.quant.conversion import is_conv1d


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A tensor on disk that is a parameter, or some rows of one.

    Attributes:
        key: Its name on disk.
        shape: Its shape, not quantized.
    """

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """One parameter of a checkpoint.

    Attributes:
        name: Its name in the model.
        pieces: The tensors on disk that form it; for fused experts, those of all experts in order.
    """

    name: str
    pieces: tuple[TensorPiece, ...]

    @property
    def num_weights(self) -> int:
        """Logical weights."""
        return sum(prod(piece.shape) for piece in self.pieces)


class WeightStream:
    """A checkpoint in the base format of a run, read one parameter at a time on the CPU.

    Args:
        config: Which model.
        base: The format of its weights.
        dtype: Its compute dtype.
        task: What its head predicts; tokens if None.

    Attributes:
        model: The model on the meta device; adapters may be attached to it.
        entries: Its parameters that are in the files, in reading order.
        towers: The tensors on disk of the image and audio towers of a multimodal model, by key.

    Raises:
        ModelError: The model cannot be found or read, or its file layout cannot be restored.
        QuantizationError: A weight cannot be quantized to the format.
    """

    def __init__(
        self, config: ModelConfig, base: BaseConfig, dtype: torch.dtype, task: ModelTask | None = None
    ) -> None:
        device = torch.device("cpu")
        task = task or ModelTask()
        self.model: PreTrainedModel = meta_model(config, device, dtype, task)
        convert_base(self.model, config, base)
        self._architecture = build(self.model.config, dtype, trust_remote_code=config.trust_remote_code, task=task)
        plan, self._folder = plan_weights(self.model, config, self._architecture)
        self._plan = without_other_heads(plan, self._architecture, config)
        self.towers = {key: self._plan.stored[key] for key in self._plan.towers}
        self._keys = {id(stored): key for key, stored in self._plan.stored.items()}
        self._groups = {group.target: group for group in self._plan.groups}
        self._writer = WeightWriter(self.model, self._architecture, device, allocate=False)
        self.entries = tuple(WeightEntry(name, self._pieces(group)) for name, group in self._groups.items())

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        """Yields the module of a parameter, which is loaded while the block runs."""
        with self._writer.allocated(name) as module:
            read_group(self._groups[name], self._writer, self._architecture, self._folder)
            yield module

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter of the architecture."""
        return tuple(self._architecture.get_parameter_or_buffer(name).shape)

    def holder(self, name: str) -> nn.Module:
        """Returns the module of a parameter, without allocating it: the quantized one, or its owner."""
        return self._writer.holder(name)

    def _pieces(self, group: Group) -> tuple[TensorPiece, ...]:
        match group:
            case Plain():
                return (self._piece(group.stored),)
            case QuantizedWeight():
                shape = tuple(self._architecture.get_parameter(group.target).shape)
                codes = next(group.parts[key] for key in ("weight", "W_q", "blocks") if key in group.parts)
                return (TensorPiece(self._keys[id(codes)].removesuffix("_blocks"), shape),)
            case GgufWeight():
                return (TensorPiece(group.target, group.shape),)
            case Experts():
                return tuple(self._piece(part) for parts in group.parts for part in parts)
            case Converted():
                raise ModelError(
                    f"{type(self.model).__name__} cannot be written in the layout of its files yet.",
                    where=group.target,
                    why="transformers converts this weight while it loads, and Ingle cannot reverse the conversion",
                    fix="export the adapter alone: --to peft",
                )

    def _piece(self, stored: StoredTensor) -> TensorPiece:
        return TensorPiece(self._keys[id(stored)], stored.shape)


def original_weights(config: ModelConfig, task: ModelTask) -> Callable[[str], Tensor]:
    """Returns a function that reads the weight of a linear layer from the files, float32 ``[O, I]``, by its path."""
    stream = WeightStream(config, NoBase(), torch.float32, task)

    def read(path: str) -> Tensor:
        name = f"{path}.weight"
        with stream.loaded(name) as module:
            value = plain_value(module, name)
            return (value.t() if is_conv1d(module) else value).clone()

    return read


def plain_value(module: nn.Module, name: str) -> Tensor:
    """Returns the value of a parameter or buffer that is not quantized."""
    value: Tensor = getattr(module, leaf_of(name))
    return value.detach()
