"""The two ends of a language model, packed: what a GGUF file holds in blocks stays in blocks.

Legend: V = vocabulary, H = hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ingle.quant.format import Format
from ingle.quant.linear import Packed, QuantLinear
from ingle.quant.mixing import Formats


class QuantEmbedding(Packed):
    """An embedding ``[V, H]`` whose rows are decoded when they are looked up."""

    def __init__(
        self,
        format: Format,
        num_embeddings: int,
        embedding_dim: int,
        *,
        weight_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(format, num_embeddings, embedding_dim, weight_dtype=weight_dtype, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., H]``, in ``weight_dtype``."""
        rows = ids.reshape(-1)
        planes = {name: plane[rows] for name, plane in self.planes().items()}
        decoded = self.format.decode(planes, len(rows), self.in_features, self.weight_dtype)
        return decoded.view(*ids.shape, self.in_features)


def pack_ends(model: Any, formats: Formats) -> None:
    """Replaces a language model's embedding and head by packed ones, where a format is found for them; in place.

    Tied ones share their planes.  An embedding of a class of its own (Gemma's, which scales) stays as it is, and so
    does a head that is tied to it.

    Args:
        model: On the meta device, with ``get_input_embeddings`` and ``get_output_embeddings``.
        formats: From a module's name and shape to its format.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    num_rows, width = embedding.weight.shape
    dtype, device = embedding.weight.dtype, embedding.weight.device
    format = formats(names[id(embedding)], num_rows, width) if type(embedding) is nn.Embedding else None
    packed = None
    if format is not None:
        packed = QuantEmbedding(format, num_rows, width, weight_dtype=dtype, device=device)
        model.set_input_embeddings(packed)
    if type(head) is not nn.Linear or (tied and packed is None):
        return
    format = format if tied else formats(names[id(head)], *head.weight.shape)
    if format is None:
        return
    linear = QuantLinear(
        format, head.in_features, head.out_features, bias=head.bias is not None, weight_dtype=dtype, device=device
    )
    linear.bias = head.bias
    if tied and packed is not None:
        for name in linear.specs:
            linear.register_parameter(name, packed.get_parameter(name))
    model.set_output_embeddings(linear)
