"""The tensors of a ``.gguf`` file as weights of a model: its own bytes, with rows in transformers' order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingle.errors import GgufError
from ingle.gguf import GgufTensor
from ingle.quant import GgufFormats
from ingle.quant.format import PLAIN


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """One tensor that is one parameter.

    Attributes:
        target: The parameter.
        tensor: Where it is.
        order: Which row of the parameter each row of the tensor is; None where rows stay in place.
        offset: What the file has added to the values.
    """

    target: str
    tensor: GgufTensor
    order: NDArray[np.int64] | None
    offset: float

    def rows(self) -> Tensor:
        """The bytes of its rows, uint8 ``[rows, bytes of a row]``, in the parameter's order."""
        data = torch.from_numpy(self.tensor.read())
        if len(self.tensor.shape) < 2:  # a bias: every value is a row of its own
            data = data.view(self.tensor.shape[0], -1)
        return data if self.order is None else data[torch.from_numpy(np.argsort(self.order))]

    def value(self, dtype: torch.dtype) -> Tensor:
        """The parameter's value; packed tensors are decoded.

        Raises:
            GgufError: When its type is not read.
        """
        name, shape = self.tensor.type_name, self.tensor.shape
        if name in PLAIN:
            value = self.rows().view(PLAIN[name]).view(shape)
            return value if not self.offset else (value.float() - self.offset).to(dtype)
        format = GgufFormats()(name)
        if format is None:
            raise unread_type(self.tensor)
        value = format.decode({"data": self.rows()}, self.tensor.num_rows, shape[-1], dtype).view(shape)
        return value if not self.offset else value - self.offset


def unread_type(tensor: GgufTensor) -> GgufError:
    """The error for a tensor of a type that Ingle does not hold."""
    return GgufError(
        f"{tensor.name} is held as {tensor.type_name}, which is not supported.",
        where=str(tensor.path),
        fix="choose a file of another type, Q4_K_M for instance",
    )
