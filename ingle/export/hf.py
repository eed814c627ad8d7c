"""Merged weights as safetensors in the hub's names, written tensor by tensor.

Plain types (``bf16 f16 f32``) are what transformers, vLLM and converters read; ``nf4``, ``fp4`` and ``int8`` are
written in bitsandbytes' layout and ``hqq`` in its package's, so that they load packed.  Formats of GGUF blocks are
exchanged as GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle import models, quant
from ingle.config.base import BaseConfig, HqqBase, NoBase
from ingle.config.model import ModelConfig
from ingle.errors import ConfigError, QuantizationError
from ingle.evaluation.format_survey import BITSANDBYTES, HQQ, safetensors_base
from ingle.events import Progress, Sink
from ingle.export.fidelity import TensorFidelity, measure
from ingle.export.gguf_types import AS_TRAINED
from ingle.export.merging import Loaded, Merger
from ingle.export.shards import ShardWriter
from ingle.gguf.mixes import ALIASES, FILE_TYPES
from ingle.models.loading.streaming import Entry
from ingle.quant import to_bitsandbytes
from ingle.quant.format import PLAIN, Format
from ingle.quant.hqq import Hqq
from ingle.quant.interchange_hqq import to_hqq
from ingle.quant.linear import QuantModule
from ingle.wording import nearest

#: What transformers needs to read them.
READERS = {"nf4": ("bitsandbytes",), "fp4": ("bitsandbytes",), "int8": ("bitsandbytes",), "hqq": ("hqq",)}

#: Parts under which a packed weight is stored, at most.
_MAX_PARTS = 24


@dataclass(frozen=True, slots=True)
class Layout:
    """In what the weights are written.

    Attributes:
        dtype: Of everything that is not packed.
        base: The format of the linear maps; none for plain types.
    """

    dtype: torch.dtype
    base: BaseConfig

    @property
    def name(self) -> str:
        """As on the command line."""
        if isinstance(self.base, NoBase):
            return next(name for name, dtype in PLAIN.items() if dtype == self.dtype)
        if isinstance(self.base, HqqBase):
            return f"hqq-{self.base.bits}-g{self.base.group_size}".removesuffix("-g64")
        return self.base.format


def choose_layout(type_name: str, base: BaseConfig) -> Layout:
    """The layout that ``--type`` names.

    Args:
        type_name: As typed.
        base: What the run trained on; its block size, bits and the like are taken over where only the format is named.

    Raises:
        ConfigError: There is no such layout among safetensors.
    """
    if type_name in PLAIN:
        return Layout(PLAIN[type_name], NoBase())
    if type_name == base.format and type_name in READERS:
        return Layout(torch.bfloat16, base)
    packed = safetensors_base({"hqq": "hqq-4"}.get(type_name, type_name))
    if packed is not None:
        return Layout(torch.bfloat16, packed)
    known = (*PLAIN, *BITSANDBYTES, *HQQ)
    near = nearest(type_name, (*known, *FILE_TYPES), cutoff=0.5)
    if type_name in (AS_TRAINED, *FILE_TYPES, *ALIASES):
        fix: str | None = f"--to gguf --type {type_name}"
    elif near is not None:
        fix = f"did you mean {near}?" if near in known else f"did you mean --to gguf --type {near}?"
    else:
        fix = None
    raise ConfigError(
        f"Safetensors have no type {type_name!r}.",
        where=f"--type {type_name}",
        why=f"types are {', '.join(known)}; HQQ also with a group size: hqq-3-g32",
        fix=fix,
    )


def estimate_bytes(merger: Merger, layout: Layout) -> int:
    """Bytes the weights take, as an upper bound."""
    return sum(entry.num_weights for entry in merger.stream.entries) * layout.dtype.itemsize


def write_safetensors(
    merger: Merger,
    tokenizer: Any,
    model: ModelConfig,
    folder: Path,
    layout: Layout,
    *,
    importance: Mapping[str, Tensor] | None = None,
    sink: Sink | None = None,
) -> list[TensorFidelity]:
    """Writes the merged model with its config and tokenizer.

    Args:
        merger: Base and adapter.
        tokenizer: Its tokenizer.
        model: The base.
        folder: Where.
        layout: In what.
        importance: Mean squares of inputs by parameter, for formats that weigh their error by it.
        sink: Gets the progress.

    Returns:
        What survived of every merged weight.

    Raises:
        QuantizationError: A weight cannot be held in the layout.
    """
    entries = merger.stream.entries
    formats = _formats(model, layout)
    num_tensors = sum(len(entry.pieces) for entry in entries) * (_MAX_PARTS if formats else 1) + len(merger.untied)
    writer = ShardWriter(folder, num_tensors)
    found: list[TensorFidelity] = []
    for done, entry in enumerate(entries, 1):
        with merger.loaded(entry) as loaded:
            weighed = (importance or {}).get(entry.name)
            for key, tensor in _tensors(entry, loaded, layout, formats.get(entry.name), found, weighed):
                writer.add(key, tensor)
        if sink is not None and (done % 32 == 0 or done == len(entries)):
            sink(Progress("writing weights", done, len(entries)))
    for name in merger.untied:
        writer.add(name, merger.trained[name].to(layout.dtype))
    writer.finish()
    models.save_setup(
        merger.stream.model,
        tokenizer,
        folder,
        dtype=layout.dtype,
        untied=bool(merger.untied),
        quantization=_quantization_config(layout),
    )
    return found


def _tensors(
    entry: Entry,
    loaded: Loaded,
    layout: Layout,
    format: Format | None,
    found: list[TensorFidelity],
    importance: Tensor | None,
) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors that one parameter becomes."""
    if format is not None:
        if len(entry.pieces) != 1:
            raise QuantizationError(
                f"Safetensors have no layout for fused experts in {format.name}.", where=entry.name, fix="--type bf16"
            )
        (piece,) = entry.pieces
        if loaded.layer is None:
            planes = loaded.planes(format, importance)
        else:
            merged, fidelity = measure(loaded, piece.key, format, importance)
            assert isinstance(merged, dict)
            planes = merged
            found.append(fidelity)
        layer = piece.key.removesuffix("weight")
        if isinstance(format, Hqq):
            parts = to_hqq(planes, format, *piece.shape, dtype=layout.dtype)
        else:
            parts = to_bitsandbytes(planes, format, *piece.shape, dtype=layout.dtype)
        for part, tensor in parts.items():
            yield layer + part, tensor
        return
    if loaded.layer is not None:
        _, fidelity = measure(loaded, entry.pieces[0].key, layout.dtype)
        found.append(fidelity)
    value = loaded.merged(layout.dtype)
    if len(entry.pieces) == 1:
        yield entry.pieces[0].key, value.view(entry.pieces[0].shape)
        return
    below = value.flatten(0, 1)  # [experts, rows, columns]: pieces lie one below the other
    start = 0
    for piece in entry.pieces:
        count = prod(piece.shape[:-1])
        yield piece.key, below[start : start + count].view(piece.shape)
        start += count


def _formats(model: ModelConfig, layout: Layout) -> Mapping[str, Format]:
    """The format of every parameter that the layout packs."""
    if isinstance(layout.base, NoBase):
        return {}
    skeleton = models.meta_model(model, "cpu", layout.dtype)
    quant.convert(skeleton, layout.base)
    packed = {name: module for name, module in skeleton.named_modules() if isinstance(module, QuantModule)}
    return {f"{name}.weight" if module.num_stacked is None else name: module.format for name, module in packed.items()}


def _quantization_config(layout: Layout) -> dict[str, Any] | None:
    """What transformers needs to know about packed weights."""
    base: Any = layout.base
    if isinstance(base, NoBase):
        return None
    if base.format == "hqq":
        params = {"nbits": base.bits, "group_size": base.group_size, "axis": 1}
        return {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}, "skip_modules": ["lm_head"]}
    if base.format == "int8":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": base.format,
        "bnb_4bit_use_double_quant": base.double_quant,
        "bnb_4bit_compute_dtype": str(layout.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
