"""The adapter alone as GGUF, for ``llama-server --lora``: A and B for a base that stays as it is.

Rows of B are put into llama.cpp's order where those of the base are.  One ``alpha`` holds for the whole file, so a
module whose scale is another has it multiplied into B.

Source: llama.cpp's ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ingle.adapters.lora import LoraLinear
from ingle.errors import AdapterError
from ingle.export.merging import Merger, is_transposed
from ingle.gguf import TensorToWrite, write_gguf
from ingle.gguf import architecture as shapes
from ingle.gguf.names import names_of
from ingle.quant.format import PLAIN


def write_adapter(merger: Merger, path: Path, type_name: str, metadata: Mapping[str, Any]) -> int:
    """Writes the adapter.

    Args:
        merger: Base and adapter.
        path: Where.
        type_name: One of :data:`~ingle.quant.format.PLAIN`.
        metadata: What else the file says of itself.

    Returns:
        Weights that were adapted.

    Raises:
        AdapterError: There is no adapter, or it holds modules trained whole, for which such a file has no place.
        GgufError: llama.cpp does not know the architecture.
    """
    layers = merger.all_layers
    if not layers:
        raise AdapterError("There is no adapter to export.", fix="--to gguf writes the model")
    if merger.trained:
        raise AdapterError(
            f"An adapter file has no place for {', '.join(merger.trained)}, trained as a whole.",
            fix="--to gguf merges everything into one file",
        )
    described = shapes.to_metadata(merger.stream.model.config.to_dict())
    names = names_of(described)
    rank = max(layer.rank for layer in layers.values())
    scale = next(iter(layers.values())).scale
    alpha = scale * rank
    about = {
        "general.architecture": names.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    tensors = []
    for name, layer in layers.items():
        gguf_name = names.to_gguf(name)
        if gguf_name is None or is_transposed(layer.base):
            raise AdapterError(f"llama.cpp has no tensor for {name}.", where=name, fix="--to peft")
        a, b = factors(layer, alpha)
        order = names.permutation(gguf_name, len(b))
        rows = b if order is None else b[torch.from_numpy(order)]
        for kind, value in (("lora_a", a), ("lora_b", rows)):
            tensors.append(_tensor(f"{gguf_name}.{kind}", type_name, value))
    write_gguf(path, about | dict(metadata), tensors)
    return len(layers)


@torch.no_grad()
def factors(layer: LoraLinear, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[R, I]`` and B ``[O, R]`` such that ``alpha / R * B A`` is the layer's change."""
    a = layer.spread(layer.lora_a.detach().float())
    b = layer.lora_b.detach().float() * (layer.scale * layer.rank / alpha)
    return a.contiguous(), b.contiguous()


def _tensor(name: str, type_name: str, value: torch.Tensor) -> TensorToWrite:
    data: NDArray[Any] = value.to(PLAIN[type_name]).contiguous().view(torch.uint8).numpy()
    return TensorToWrite(name, type_name, tuple(value.shape), lambda: np.ascontiguousarray(data))
