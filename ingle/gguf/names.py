"""Maps the parameters of transformers to the tensors of GGUF files.

Most parameters are one tensor with another name. llama.cpp's converter also moves rows and columns, joins or splits
tensors, and changes the values of some. A block never crosses a row, so moving quantized rows is exact.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and the ``gguf`` package's ``tensor_mapping.py``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.gguf.container import block_of
from ingle.gguf.families import family_of_config
from ingle.gguf.families.family import Change, GgufFamily

_NUMBER = re.compile(r"\.(\d+)\.")
_LEAVES = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """How tensors of a file form one parameter.

    The rows of the parameter are those of all tensors, one after the other and then reordered. Arrays of rows are
    ``[rows, X]``, or ``[experts, rows, X]`` for stacked experts; X is bytes or columns.

    Attributes:
        target: The parameter.
        tensors: Their names in the file.
        shape: Shape of the parameter.
        change: How rows, columns and values differ.
    """

    target: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    change: Change

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter has a matrix for each expert."""
        return "_exps." in self.tensors[0] and len(self.shape) > 1

    @property
    def num_experts(self) -> int | None:
        """Number of stacked matrices; None for a single one."""
        return self.shape[0] if self.is_stacked else None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of each matrix, as the file stores them."""
        rows, *columns = self.shape[1:] if self.is_stacked else self.shape
        size = int(np.prod(columns, dtype=np.int64))
        return (size, rows) if self.change.is_transposed else (rows, size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of rows of each tensor."""
        count = len(self.tensors)
        return self.change.sizes or (self.matrix[0] // count,) * count

    @property
    def file_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor in the file."""
        if self.change.shape is not None:
            return (self.change.shape,)
        stack = self.shape[:1] if self.is_stacked else ()
        rest = self.shape[len(stack) + 1 :] if not self.change.is_transposed else (self.matrix[1],)
        return tuple((*stack, size, *rest) for size in self.sizes)

    def moves_bytes(self, type_name: str) -> bool:
        """Returns whether the bytes of a quantized type can move between the parameter and the file as they are.

        Groups of columns move only if no block crosses their borders.
        """
        columns = self.change.columns is None or self.change.column_width % block_of(type_name)[0] == 0
        return columns and self.change.keeps_values and self.change.shape is None

    def join(self, parts: list[NDArray[Any]]) -> NDArray[Any]:
        """Returns the parameter's rows from the rows of each tensor; X may be bytes or columns."""
        stack = () if self.num_experts is None else (self.num_experts,)
        canonical = [part.reshape(*stack, size, -1) for part, size in zip(parts, self.sizes, strict=True)]
        rows = canonical[0] if len(canonical) == 1 else np.concatenate(canonical, axis=-2)
        order = self.change.rows
        rows = rows if order is None else np.take(rows, np.argsort(order), axis=-2)
        return np.ascontiguousarray(self.columns_from_file(rows))

    def split(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """Inverts :meth:`join`."""
        return self.split_rows(self.columns_to_file(rows))

    def split_rows(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """Returns the rows of each tensor, with X as it is."""
        order, ends = self.change.rows, np.cumsum(self.sizes)[:-1].tolist()
        rows = rows if order is None else np.take(rows, order, axis=-2)
        return [np.ascontiguousarray(part) for part in np.split(rows, ends, axis=-2)]

    def values_in_file(self, value: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Returns the values of each tensor for those of the parameter, as matrices or stacks of matrices."""
        value = value.swapaxes(-1, -2) if self.change.is_transposed else value
        stack = () if self.num_experts is None else (self.num_experts,)
        return self.split(self.change.to_file(value.reshape(*stack, *self.matrix)))

    def columns_to_file(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Returns rows, or one value for each column, with columns in the order of the file."""
        return self._move_columns(rows, self.change.columns)

    def columns_from_file(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Inverts :meth:`columns_to_file`."""
        columns = self.change.columns
        return self._move_columns(rows, None if columns is None else np.argsort(columns))

    def _move_columns(self, rows: NDArray[Any], order: NDArray[np.int64] | None) -> NDArray[Any]:
        if order is None:
            return rows
        groups = rows.reshape(*rows.shape[:-1], len(order), -1)
        return np.ascontiguousarray(np.take(groups, order, axis=-2)).reshape(rows.shape)


@dataclass(frozen=True)
class TensorNames:
    """The tensors of a model in transformers and in GGUF.

    Attributes:
        family: Its architecture.
        config: The content of its ``config.json``, of the text part of a model that also reads images.
        decoder: Path of the module that contains the layers; that of the family if empty.
        head: Path of the output head.
    """

    family: GgufFamily
    config: Mapping[str, Any]
    decoder: str = ""
    head: str = "lm_head"

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.family.architecture

    def tensors(self, target: str) -> tuple[str, ...]:
        """Returns the names of the tensors that form a parameter of transformers; none if the file has none."""
        pattern, layer = _split_number(self._own_name(target))
        return tuple(tensor.replace("*", layer) for tensor in self._tensors.get(pattern, ()))

    def to_gguf(self, target: str) -> str | None:
        """Returns the GGUF name of a parameter of transformers, or None unless it is exactly one tensor."""
        tensors = self.tensors(target)
        return tensors[0] if len(tensors) == 1 else None

    def to_hf(self, name: str, known: Container[str] | None = None) -> str | None:
        """Returns the parameter that a GGUF tensor is, or is a part of; None if there is none.

        Args:
            name: The tensor.
            known: The parameters of the model; they decide where models of one architecture differ.
        """
        pattern, layer = _split_number(name)
        found = [self._inner_name(each, layer) for each in self._parameters.get(pattern, ())]
        return next((each for each in found if known is None or each in known), None)

    def _inner_name(self, found: str, layer: str) -> str:
        if found.startswith("lm_head."):
            return f"{self.head}{found.removeprefix('lm_head')}"
        target, own = found.replace("*", layer), self.family.decoder
        return f"{self.decoder}{target.removeprefix(own)}" if self.decoder and target.startswith(f"{own}.") else target

    def is_left_out(self, target: str) -> bool:
        """Returns whether files of this architecture never have a parameter."""
        return target.startswith(self.family.left_out)

    def rule(self, target: str, shape: tuple[int, ...], stored: Container[str] | None = None) -> TensorRule | None:
        """Returns how a parameter is stored in GGUF, or None if it is not.

        Args:
            target: The parameter.
            shape: Its shape.
            stored: The tensors of a file; it may have a single tensor where others have several.
        """
        tensors = self.tensors(target)
        if not tensors:
            return None
        change = self._change(target, shape)
        if stored is not None and tensors[0] not in stored and (fused := self._fused(target)) in stored:
            rows = None if change.rows is None else np.arange(len(change.rows))  # files fuse in the parameter's order
            return TensorRule(target, (fused,), shape, replace(change, rows=rows, sizes=()))
        return TensorRule(target, tensors, shape, change)

    def _change(self, target: str, shape: tuple[int, ...]) -> Change:
        inner = _split_number(self._own_name(target))[0].removeprefix(f"{self._layer}.")
        rule = self.family.rules.get(inner) or self.family.rules.get(inner.rpartition(".")[0])
        return Change() if rule is None else rule(self.config, shape)

    def _fused(self, target: str) -> str:
        pattern, layer = _split_number(self._own_name(target))
        fused = self.family.fused.get(pattern.removeprefix(f"{self._layer}."))
        return "" if fused is None else f"blk.{layer}.{fused}"

    def _own_name(self, target: str) -> str:
        """Returns the name that a parameter has in a model that only reads text."""
        if target.startswith(f"{self.head}."):
            return f"lm_head{target.removeprefix(self.head)}"
        if self.decoder and target.startswith(f"{self.decoder}."):
            return f"{self.family.decoder}{target.removeprefix(self.decoder)}"
        return target

    @property
    def _layer(self) -> str:
        """Path of a layer, with a star for its number."""
        return f"{self.family.decoder}.{self.family.layers}.*"

    @cached_property
    def _tensors(self) -> dict[str, tuple[str, ...]]:
        """The tensors of each parameter; a star in both is the number of a layer."""
        family = self.family
        modules = {f"{self._layer}.{path}": f"blk.*.{part}" for path, part in family.layer.items()}
        modules |= {path: part for path, part in family.top.items() if not (path == "lm_head" and family.is_tied)}
        found = {f"{path}.{leaf}": (f"{part}.{leaf}",) for path, part in modules.items() for leaf in _LEAVES}
        return found | {
            f"{self._layer}.{path}": tuple(f"blk.*.{tensor}" for tensor in tensors)
            for path, tensors in family.parameters.items()
        }

    @cached_property
    def _parameters(self) -> dict[str, list[str]]:
        """The parameters of each tensor; a star in both is the number of a layer."""
        found: dict[str, list[str]] = {}
        for path, tensors in self._tensors.items():
            for tensor in tensors:
                found.setdefault(tensor, []).append(path)
        for path, tensor in self.family.fused.items():
            found.setdefault(f"blk.*.{tensor}", [f"{self._layer}.{path}"])
        return found


def names_of(config: Mapping[str, Any], *, decoder: str = "", head: str = "lm_head") -> TensorNames:
    """Returns the tensor names of a model.

    Args:
        config: The content of its ``config.json``; :func:`~ingle.gguf.architecture.to_config` of a file.
        decoder: Path of the module that contains the layers, if it is not that of the plain text model.
        head: Path of the output head.

    Raises:
        GgufError: The architecture is not supported.
    """
    return TensorNames(family_of_config(config), config, decoder, head)


def names_of_model(model: Any) -> TensorNames:
    """Returns the tensor names of a model of transformers, or of the text part of a multimodal one.

    Args:
        model: Has ``config``, ``get_input_embeddings`` and ``get_output_embeddings``.

    Raises:
        GgufError: The architecture is not supported.
    """
    whole = model.config
    text = whole if whole.is_encoder_decoder else whole.get_text_config(decoder=True)
    config = text.to_dict() | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}
    config["architectures"] = [type(model).__name__]
    paths = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = "" if text is whole else paths[id(embedding)].rpartition(".")[0]
    return names_of(config, decoder=decoder, head=paths.get(id(head), "lm_head"))


def _split_number(name: str) -> tuple[str, str]:
    """Returns a name with a star for its first number, and that number; the name itself if there is none."""
    match = _NUMBER.search(name)
    return (name, "") if match is None else (f"{name[: match.start(1)]}*{name[match.end(1) :]}", match[1])
