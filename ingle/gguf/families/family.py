"""One record for each architecture of llama.cpp: its tensors, how they form parameters, and its metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.gguf.container import ArchitectureValues, GgufFile

#: The content of ``config.json``.
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """How the values of a parameter differ between transformers and a file. Every part of it is invertible.

    A parameter is regarded as a matrix of rows and columns, or as a stack of matrices for experts.

    Attributes:
        rows: The row of the parameter for each row of the file, over all tensors that form it; None for the same order.
        sizes: Number of rows of each tensor; empty if all have the same number.
        columns: As ``rows``, for groups of ``column_width`` columns.
        column_width: Number of neighboring columns that move together.
        scale: Factor of each row, or of all, by which the file multiplies.
        offset: Number that the file adds.
        is_negative_exp: Whether the file contains ``-exp(x)``.
        shape: Shape of the tensor in the file if it is not that of the parameter; for a single tensor.
        is_transposed: Whether transformers stores each matrix as ``[columns, rows]``.
    """

    rows: NDArray[np.int64] | None = None
    sizes: tuple[int, ...] = ()
    columns: NDArray[np.int64] | None = None
    column_width: int = 1
    scale: NDArray[np.float32] | float = 1.0
    offset: float = 0.0
    is_negative_exp: bool = False
    shape: tuple[int, ...] | None = None
    is_transposed: bool = False

    @property
    def keeps_values(self) -> bool:
        """Whether rows and columns only move, so that quantized bytes move with them."""
        return bool(np.all(np.equal(self.scale, 1.0))) and not self.offset and not self.is_negative_exp

    def to_file(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values in the file for those of the parameter; rows keep the parameter's order."""
        if self.is_negative_exp:
            return (-np.exp(values.astype(np.float64))).astype(np.float32)
        if self.keeps_values:
            return values  # adding zero would turn -0.0 into 0.0
        changed: NDArray[np.float32] = values * _factors(self.scale) + np.float32(self.offset)
        return changed

    def from_file(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Inverts :meth:`to_file`."""
        if self.is_negative_exp:
            return np.log(-values.astype(np.float64)).astype(np.float32)
        original: NDArray[np.float32] = (values - np.float32(self.offset)) / _factors(self.scale)
        return original


#: Returns the change of a parameter of a shape.
Rule = Callable[[Config, tuple[int, ...]], Change]


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """An architecture of llama.cpp.

    Attributes:
        architecture: llama.cpp's name, the prefix of its metadata.
        model_type: That of the equivalent config of transformers.
        class_name: The class of transformers.
        read_config: Returns the content of ``config.json`` for a file, without the parts that all families share.
        write_metadata: Returns the metadata for a config, without the architecture's prefix.
        layer: Modules in a layer, and the tensors (without ``weight`` or ``bias``) of their parameters.
        top: As ``layer``, for the modules outside layers. For models with two stacks of layers, a star in a path and in
            its tensor is the number of a layer.
        parameters: Parameters in a layer, and the tensors that form them, where names do not follow from ``layer``.
        fused: A single tensor that some files have in place of those in ``parameters``.
        rules: Changes by module or parameter; the key of one outside layers is its full path.
        sizes: Returns the shapes that tensors of a layer must have; without ``blk.N.`` and ``.weight``.
        decoder: Path of the module that contains the layers.
        layers: Path of the layers in it.
        left_out: How the names of parameters begin that no file has.
        is_tied: Whether llama.cpp always uses the embedding as the output head; None if it never does.
        marker: A key of the metadata that only files of this family have, where two have the same architecture.
        also: Other model types that llama.cpp computes with this architecture.
    """

    architecture: str
    model_type: str
    class_name: str
    read_config: Callable[[GgufFile, ArchitectureValues], dict[str, Any]]
    write_metadata: Callable[[Config], dict[str, Any]]
    layer: Mapping[str, str]
    sizes: Callable[[Config], Mapping[str, tuple[int, ...]]]
    top: Mapping[str, str] = field(
        default_factory=lambda: {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }
    )
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    decoder: str = "model"
    layers: str = "layers"
    left_out: tuple[str, ...] = ()
    is_tied: bool | None = False
    marker: str = ""
    also: tuple[str, ...] = ()

    @property
    def has_experts(self) -> bool:
        """Whether a model may have stacked experts."""
        return any("_exps." in tensor for tensors in self.parameters.values() for tensor in tensors)

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every model type of transformers that is written as this architecture."""
        return (self.model_type, *self.also)


def interleave(heads: str) -> Rule:
    """Returns the rule of llama.cpp's rotation of neighboring pairs, where transformers rotates halves.

    Args:
        heads: The key of the config with the number of heads.
    """

    def rule(config: Config, shape: tuple[int, ...]) -> Change:
        num_heads = config.get(heads) or config["num_attention_heads"]
        halves = np.arange(shape[0], dtype=np.int64).reshape(num_heads, 2, -1)
        return Change(rows=np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1))

    return rule


def split_heads(heads: str) -> Rule:
    """Returns the rule of a fused projection whose rows are q, k and v of each head; a file has them for all heads.

    Args:
        heads: The key of the config with the number of heads.
    """

    def rule(config: Config, shape: tuple[int, ...]) -> Change:
        by_head = np.arange(shape[0], dtype=np.int64).reshape(config[heads], 3, -1)
        return Change(rows=np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(-1))

    return rule


def plus_one(config: Config, shape: tuple[int, ...]) -> Change:
    """The rule of norms whose weights transformers stores minus one."""
    return Change(offset=1.0)


def squeeze(config: Config, shape: tuple[int, ...]) -> Change:
    """The rule of depthwise convolutions: ``[C, 1, K]`` is ``[C, K]`` in a file."""
    return Change(shape=(shape[0], shape[-1]))


def negative_exp(config: Config, shape: tuple[int, ...]) -> Change:
    """The rule of state decays: transformers has ``log(-A)``, a file has ``A``."""
    return Change(is_negative_exp=True)


def _factors(scale: NDArray[np.float32] | float) -> Any:
    return scale[:, None] if isinstance(scale, np.ndarray) else np.float32(scale)
