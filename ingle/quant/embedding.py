"""The two ends of a language model, packed: what a GGUF file holds in blocks stays in blocks.

Legend: V = vocabulary, H = hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear, QuantModule
from ingle.quant.mixing import Formats


class QuantEmbedding(QuantModule):
    """An embedding ``[V, H]`` whose rows are decoded when they are looked up.

    Args:
        original: What it stands in for; its scale, if it has one, is taken over.
        format: What the planes mean.
    """

    def __init__(self, original: nn.Embedding, format: Format) -> None:
        weight = original.weight
        super().__init__(format, *weight.shape, weight_dtype=weight.dtype, device=weight.device)
        self.register_buffer("embed_scale", getattr(original, "embed_scale", None), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., H]``, in ``weight_dtype``."""
        rows = ids.reshape(-1)
        planes = {name: plane[rows] for name, plane in self.planes().items()}
        decoded = self.format.decode(planes, len(rows), self.in_features, self.weight_dtype)
        scale: Tensor | None = self._buffers["embed_scale"]
        scaled = decoded if scale is None else decoded * scale.to(self.weight_dtype)
        return scaled.view(*ids.shape, self.in_features)


def quantize_ends(model: Any, formats: Formats) -> None:
    """Replaces a language model's embedding and head by packed ones, where a format is found for them; in place.

    Tied ones share their planes.  An embedding of a class that is not known stays as it is, and so does a head that is
    tied to it.

    Args:
        model: On the meta device, with ``get_input_embeddings`` and ``get_output_embeddings``.
        formats: From a module's name and shape to its format.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    format = formats(names[id(embedding)], *embedding.weight.shape) if _is_plain(embedding) else None
    packed = None
    if format is not None:
        packed = QuantEmbedding(embedding, format)
        model.set_input_embeddings(packed)
    if type(head) is not nn.Linear or (tied and packed is None):
        return
    format = format if tied else formats(names[id(head)], *head.weight.shape)
    if format is None:
        return
    linear = QuantLinear(
        format,
        head.in_features,
        head.out_features,
        bias=head.bias is not None,
        weight_dtype=head.weight.dtype,
        device=head.weight.device,
    )
    linear.bias = head.bias
    if tied and packed is not None:
        for name in linear.specs:
            linear.register_parameter(name, packed.get_parameter(name))
    model.set_output_embeddings(linear)


def _is_plain(module: nn.Module) -> bool:
    """Whether this is an embedding, or Gemma's, which multiplies its rows by a buffer ``embed_scale``."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and set(module._buffers) == {"embed_scale"}
    return type(module) is nn.Embedding or scaled
