"""Writes the merged model as safetensors in the layout of the Hugging Face hub, tensor by tensor.

transformers, vLLM and converters read the plain types ``bf16``, ``f16`` and ``f32``.  ``nf4``, ``fp4`` and ``int8`` are
written in the layout of bitsandbytes and ``hqq`` in that of its package, so they load quantized.  Formats with GGUF
blocks are written as GGUF only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from ingle.export.fidelity.measurement import TensorFidelity, measure
from ingle.export.writers.gguf_types import AS_TRAINED
from ingle.export.writers.merged_model import LoadedWeight, MergedModel
from ingle.export.writers.shards import ShardWriter
from ingle.gguf.mixes import ALIASES, FILE_TYPES
from ingle.models.loading.weight_stream import WeightEntry
from ingle.quant import to_bitsandbytes, to_mxfp4
from ingle.quant.format import PLAIN, Format
from ingle.quant.ggml.lookup import MXFP4
from ingle.quant.hqq import Hqq
from ingle.quant.interchange.hqq import to_hqq
from ingle.quant.linear import QuantModule
from ingle.wording import nearest

#: Packages that transformers needs to read a layout.
READERS = {"nf4": ("bitsandbytes",), "fp4": ("bitsandbytes",), "int8": ("bitsandbytes",), "hqq": ("hqq",), "mxfp4": ()}

#: What gpt-oss keeps unquantized.
_PLAIN_IN_MXFP4 = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")

#: Upper bound on the number of tensors that store one quantized weight.
_MAX_PARTS = 24


@dataclass(frozen=True, slots=True)
class Layout:
    """Format of the files.

    Attributes:
        dtype: Data type of everything that is not quantized.
        base: Format of the linear layers; ``none`` for plain types.
    """

    dtype: torch.dtype
    base: BaseConfig

    @property
    def name(self) -> str:
        """Name on the command line."""
        if isinstance(self.base, NoBase):
            return next(name for name, dtype in PLAIN.items() if dtype == self.dtype)
        if isinstance(self.base, HqqBase):
            return f"hqq-{self.base.bits}-g{self.base.group_size}".removesuffix("-g64")
        return self.base.format

    def quantization_config(self, towers: Sequence[str] = ()) -> dict[str, Any] | None:
        """Returns the ``quantization_config`` that transformers needs; None for plain types.

        Args:
            towers: Paths of the modules that are copied as they are.
        """
        base: Any = self.base
        skipped = {"llm_int8_skip_modules": [*towers, "lm_head"]} if towers else {}
        if isinstance(base, NoBase):
            return None
        if base.format == "hqq":
            params = {"nbits": base.bits, "group_size": base.group_size, "axis": 1}
            return {
                "quant_method": "hqq",
                "quant_config": {"weight_quant_params": params},
                "skip_modules": [*towers, "lm_head"],
            }
        if base.format == "mxfp4":
            return {"quant_method": "mxfp4", "modules_to_not_convert": [*towers, *_PLAIN_IN_MXFP4]}
        if base.format == "int8":
            return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0} | skipped
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": base.format,
            "bnb_4bit_use_double_quant": base.double_quant,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        } | skipped


def choose_layout(type_name: str, base: BaseConfig) -> Layout:
    """Returns the layout that ``--type`` names.

    Args:
        type_name: ``--type`` in lower case.
        base: Base section of the run; if ``type_name`` is its format, its options (block size, bits, ...) apply too.

    Raises:
        ConfigError: There is no such safetensors type.
    """
    if type_name in PLAIN:
        return Layout(PLAIN[type_name], NoBase())
    if type_name == base.format and type_name in READERS:
        return Layout(torch.bfloat16, base)
    quantized = safetensors_base({"hqq": "hqq-4"}.get(type_name, type_name))
    if quantized is not None:
        return Layout(torch.bfloat16, quantized)
    known = (*PLAIN, *BITSANDBYTES, *HQQ)
    near = nearest(type_name, (*known, *FILE_TYPES), cutoff=0.5)
    fix: str | None = None
    if type_name in (AS_TRAINED, *FILE_TYPES, *ALIASES):
        fix = f"--to gguf --type {type_name}"
    elif near is not None:
        fix = f"did you mean {near}?" if near in known else f"did you mean --to gguf --type {near}?"
    raise ConfigError(
        f"There is no safetensors type {type_name!r}.",
        where=f"--type {type_name}",
        why=f"types are {', '.join(known)}; HQQ also with a group size: hqq-3-g32",
        fix=fix,
    )


def estimate_bytes(merged: MergedModel, layout: Layout) -> int:
    """Returns an upper bound on the size of the weights."""
    towers = sum(tensor.num_bytes for tensor in merged.stream.towers.values())
    return sum(entry.num_weights for entry in merged.stream.entries) * layout.dtype.itemsize + towers


def write_safetensors(
    merged: MergedModel,
    tokenizer: Any,
    model: ModelConfig,
    folder: Path,
    layout: Layout,
    *,
    importance: Mapping[str, Tensor] | None = None,
    sink: Sink = lambda event: None,
) -> list[TensorFidelity]:
    """Writes the merged model with its config and tokenizer.

    The towers of a multimodal model are copied byte for byte, with the files of its processor.

    Args:
        merged: Base and adapter.
        tokenizer: Tokenizer of the model.
        model: Model section of the base.
        folder: Output folder.
        layout: Format of the files.
        importance: Mean squares of inputs by parameter, for formats that weight their error by them.
        sink: Receives progress events.

    Returns:
        The fidelity of every merged weight.

    Raises:
        QuantizationError: The layout does not support a weight.
    """
    entries = merged.stream.entries
    formats = _formats(model, layout)
    for entry in entries:
        if (
            entry.name in formats
            and layout.base.format != "mxfp4"
            and (len(entry.pieces) != 1 or len(entry.pieces[0].shape) != 2)
        ):
            message = f"Safetensors have no layout for fused experts in {formats[entry.name].name}."
            raise QuantizationError(message, where=entry.name, fix="--type bf16")
    num_tensors = sum(len(entry.pieces) for entry in entries) * (_MAX_PARTS if formats else 1) + len(merged.added)
    towers = merged.stream.towers
    writer = ShardWriter(folder, num_tensors + len(towers))
    found: list[TensorFidelity] = []
    for done, entry in enumerate(entries, 1):
        format = formats.get(entry.name)
        with merged.loaded(entry) as loaded:
            if format is None:
                tensors = _plain_tensors(entry, loaded, layout, found)
            else:
                tensors = _quantized_tensors(entry, loaded, layout, format, found, (importance or {}).get(entry.name))
            for key, tensor in tensors:
                writer.add(key, tensor)
        if done % 32 == 0 or done == len(entries):
            sink(Progress("Writing weights", done, len(entries)))
    for name in merged.added:
        writer.add(name, merged.replaced[name].to(layout.dtype))
    for key, tower in towers.items():
        writer.add(key, tower.read())
    writer.finish()
    models.save_setup(
        merged.stream.model,
        tokenizer,
        folder,
        dtype=layout.dtype,
        untied=bool(merged.untied),
        quantization=layout.quantization_config(models.tower_paths(merged.stream.model)),
    )
    if towers:
        models.copy_processor(model, folder)
    return found


def _quantized_tensors(
    entry: WeightEntry,
    loaded: LoadedWeight,
    layout: Layout,
    format: Format,
    found: list[TensorFidelity],
    importance: Tensor | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that store a quantized parameter, with their keys."""
    (piece,) = entry.pieces
    if loaded.layer is None:
        planes = loaded.planes(format, importance)
    else:
        merged, fidelity = measure(loaded, piece.key, format, importance)
        assert isinstance(merged, dict)
        planes = merged
        found.append(fidelity)
    if isinstance(format, MXFP4):
        parts = {f"_{part}": tensor for part, tensor in to_mxfp4(planes).items()}
    elif isinstance(format, Hqq):
        parts = to_hqq(planes, format, *piece.shape, dtype=layout.dtype)
    else:
        parts = to_bitsandbytes(planes, format, *piece.shape, dtype=layout.dtype)
    for part, tensor in parts.items():
        yield piece.key.removesuffix("weight") + part, tensor


def _plain_tensors(
    entry: WeightEntry, loaded: LoadedWeight, layout: Layout, found: list[TensorFidelity]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the pieces of a plain parameter, with their keys."""
    if loaded.layer is not None:
        _, fidelity = measure(loaded, entry.pieces[0].key, layout.dtype)
        found.append(fidelity)
    value = loaded.merged(layout.dtype)
    if len(entry.pieces) == 1:
        yield entry.pieces[0].key, value.view(entry.pieces[0].shape)
        return
    below = value.flatten(0, 1)  # [experts, rows, columns]: the pieces are stacked as rows
    start = 0
    for piece in entry.pieces:
        count = prod(piece.shape[:-1])
        yield piece.key, below[start : start + count].view(piece.shape)
        start += count


def _formats(model: ModelConfig, layout: Layout) -> Mapping[str, Format]:
    """Returns the format of every parameter that the layout quantizes."""
    if isinstance(layout.base, NoBase):
        return {}
    meta_model = models.meta_model(model, "cpu", layout.dtype)
    quant.convert(meta_model, layout.base)
    quantized = {name: module for name, module in meta_model.named_modules() if isinstance(module, QuantModule)}
    return {
        f"{name}.weight" if module.num_stacked is None else name: module.format for name, module in quantized.items()
    }
