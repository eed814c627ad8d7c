"""Reads the tensors of a GGUF file as weights of a model: the file's own bytes, rows in transformers' order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingle.errors import GgufError
from ingle.gguf import GgufTensor
from ingle.gguf.names import TensorRule
from ingle.quant import GgufFormats
from ingle.quant.format import PLAIN
from ingle.quant.ggml.joined import plane_names


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """The tensors of a GGUF file that form one parameter.

    Attributes:
        rule: How they form it.
        tensors: In the order of the rule.
    """

    rule: TensorRule
    tensors: tuple[GgufTensor, ...]

    @property
    def target(self) -> str:
        """Name of the parameter."""
        return self.rule.target

    @property
    def tensor(self) -> GgufTensor:
        """The first tensor."""
        return self.tensors[0]

    @property
    def type_names(self) -> tuple[str, ...] | None:
        """The types in which the parameter can hold the bytes of the file: one, or that of each tensor.

        None if it can only hold values.
        """
        names = tuple(tensor.type_name for tensor in self.tensors)
        if any(name in PLAIN or not self.rule.moves_bytes(name) for name in names):
            return None
        return names[:1] if len(set(names)) == 1 else names

    @property
    def format_name(self) -> str | None:
        """The name of the format that holds the bytes of the file."""
        return None if self.type_names is None else "+".join(self.type_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the parameter would have by the shapes of the tensors."""
        wanted = self.rule.file_shapes
        if tuple(tensor.shape for tensor in self.tensors) == wanted:
            return self.rule.shape
        return next(t.shape for t, shape in zip(self.tensors, wanted, strict=True) if t.shape != shape)

    def planes(self) -> dict[str, Tensor]:
        """Reads the bytes of all rows, in the parameter's order if they have one type; requires :attr:`type_names`.

        Returns:
            uint8 ``[rows, bytes of a row]``, with a leading dimension for stacked experts.
        """
        assert self.type_names is not None
        parts = [tensor.read() for tensor in self.tensors]
        if len(self.type_names) == 1:
            return {"data": torch.from_numpy(self.rule.join(parts))}
        stack = () if self.rule.num_experts is None else (self.rule.num_experts,)
        shaped = [part.reshape(*stack, size, -1) for part, size in zip(parts, self.rule.sizes, strict=True)]
        rows = [torch.from_numpy(self.rule.columns_from_file(part)) for part in shaped]
        return dict(zip(plane_names(len(rows)), rows, strict=True))

    def value(self, dtype: torch.dtype) -> Tensor:
        """Returns the parameter's value; dequantizes quantized tensors.

        Raises:
            GgufError: A tensor has a type that is not supported.
        """
        rule, change = self.rule, self.rule.change
        types = {tensor.type_name for tensor in self.tensors}
        is_plain = len(types) == 1 and types <= PLAIN.keys()
        own = PLAIN[self.tensor.type_name] if is_plain else dtype if change.keeps_values else torch.float32
        joined = rule.join([_decoded(tensor, own) for tensor in self.tensors])
        value = torch.from_numpy(joined).view(own)
        if not change.keeps_values:
            value = torch.from_numpy(change.from_file(value.float().numpy())).to(dtype)
        return (value.transpose(-1, -2) if change.is_transposed else value).reshape(rule.shape)


def _decoded(tensor: GgufTensor, dtype: torch.dtype) -> NDArray[np.uint8]:
    """Returns the bytes of the values of a tensor in a dtype, in the order of the file."""
    name, data = tensor.type_name, torch.from_numpy(tensor.read())
    if name in PLAIN:
        value = data.view(PLAIN[name]).to(dtype)
    elif (format := GgufFormats()(name)) is not None:
        value = format.decode({"data": data}, len(data), tensor.shape[-1], dtype)
    else:
        raise unsupported_type(tensor)
    return value.view(torch.uint8).numpy()


def unsupported_type(tensor: GgufTensor) -> GgufError:
    """Returns the error for a tensor of a type that Ingle does not support."""
    return GgufError(
        f"{tensor.name} has the type {tensor.type_name}, which is not supported.",
        where=str(tensor.path),
        fix="choose a file of another type, for example Q4_K_M",
    )
