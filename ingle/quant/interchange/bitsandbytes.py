"""Converts layers from and to the tensors of bitsandbytes, as in 4-bit and 8-bit checkpoints of the Hugging Face Hub.

=========================================== ============================== =============================
key (after the layer's name and ``.``)      nf4, fp4                       int8
=========================================== ============================== =============================
weight                                      uint8 [O * I / 2, 1]           int8 [O, I]
weight.absmax                               uint8 or float32 [O * N]
weight.quant_map                            float32 [16]
weight.nested_absmax                        float32 [M] (double quant)
weight.nested_quant_map                     float32 [256] (double quant)
weight.quant_state.bitsandbytes__nf4 (fp4)  uint8, JSON
SCB                                                                        float32 [O]
weight_format                                                              uint8 scalar, 0 = by rows
=========================================== ============================== =============================

Source: bitsandbytes 0.50 ``QuantState.as_dict(packed=True)`` and ``Linear8bitLt._save_to_state_dict``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant.format import Format
from ingle.quant.int8 import Int8
from ingle.quant.levels import NESTED_BLOCK, Fp4, Levels, Nf4, dynamic_map
from ingle.quant.plane import as_bytes, as_float32

STATE = "weight.quant_state.bitsandbytes__"


def to_bitsandbytes(
    planes: Mapping[str, Tensor],
    format: Format,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Returns the tensors of a layer by the keys of bitsandbytes (see the module), without the layer's name.

    Args:
        planes: As ``format.plane_specs`` lists them.
        format: Format of the planes.
        out_features: O.
        in_features: I.
        dtype: The dtype that readers decode to.

    Raises:
        QuantizationError: bitsandbytes does not support the format, or rows are not a multiple of the block size.
    """
    if isinstance(format, Int8):
        zero = torch.zeros((), dtype=torch.uint8)
        return {"weight": planes["codes"], "SCB": as_float32(planes["scale"]).flatten(), "weight_format": zero}
    if not isinstance(format, Levels):
        raise QuantizationError(f"The format {format.name} is not supported by bitsandbytes.")
    _require_full_blocks(format, out_features, in_features)
    codes = planes["codes"]
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": format.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [out_features, in_features],
    }
    tensors = {"weight": codes.reshape(-1, 1), "weight.quant_map": format.levels(codes.device)}
    if format.double_quant:
        offset = float(as_float32(planes["absmax_offset"]).item())
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors["weight.absmax"] = planes["absmax"].flatten()
        tensors["weight.nested_absmax"] = as_float32(planes["nested_absmax"]).flatten()
        tensors["weight.nested_quant_map"] = dynamic_map(codes.device)
    else:
        tensors["weight.absmax"] = as_float32(planes["absmax"]).flatten()
    tensors[STATE + format.name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_bitsandbytes(tensors: Mapping[str, Tensor], *, name: str = "weight") -> tuple[Format, dict[str, Tensor]]:
    """Returns the format and planes of a layer of a bitsandbytes checkpoint.

    Args:
        tensors: By the keys of bitsandbytes (see the module), without the layer's name.
        name: The layer's name for errors.

    Raises:
        QuantizationError: The layer is of an unsupported kind, or its tensors contradict each other.
    """
    if "SCB" in tensors:
        return _from_int8(tensors, name)
    states = [key for key in tensors if key.startswith(STATE)]
    if len(states) != 1:
        raise QuantizationError(f"{name} is not a bitsandbytes layer.", where=name, why=f"keys {sorted(tensors)}")
    state = _read_state(tensors[states[0]], name)
    match state["quant_type"]:
        case "nf4":
            return _from_levels(Nf4, tensors, state, name)
        case "fp4":
            return _from_levels(Fp4, tensors, state, name)
    raise QuantizationError(f"{name} has an unsupported format, {str(state['quant_type'])[:60]}.", where=name)


def _read_state(tensor: Tensor, name: str) -> dict[str, Any]:
    """Reads the JSON that bitsandbytes stores with a weight and checks the sizes in it."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        sizes = [*state["shape"], state["blocksize"]]
        if len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes) or "quant_type" not in state:
            raise ValueError(f"expected quant_type, shape and blocksize, got {str(state)[:200]}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise QuantizationError(f"{name} has an invalid quant_state.", where=name, why=str(error)) from None
    return dict(state)


def _from_levels(
    kind: type[Levels], tensors: Mapping[str, Tensor], state: Mapping[str, Any], name: str
) -> tuple[Format, dict[str, Tensor]]:
    out_features, in_features = state["shape"]
    format = kind(block_size=state["blocksize"], double_quant="weight.nested_absmax" in tensors)
    _require_full_blocks(format, out_features, in_features)
    codes = _require_key(tensors, "weight", name)
    device = codes.device
    _require_table(_require_key(tensors, "weight.quant_map", name), format.levels(device), name)
    absmax = _require_key(tensors, "weight.absmax", name)
    planes = {"codes": codes.contiguous().view(-1).view(torch.uint8)}
    if format.double_quant:
        _require_table(_require_key(tensors, "weight.nested_quant_map", name), dynamic_map(device), name)
        offset: Any = state.get("nested_offset")
        nested = state.get("nested_blocksize")
        if nested != NESTED_BLOCK or type(offset) not in (int, float) or not math.isfinite(offset):
            raise QuantizationError(
                f"{name} has unsupported nested blocks.",
                where=name,
                why=f"nested_blocksize {str(nested)[:60]}, nested_offset {str(offset)[:60]}",
            )
        scales = tensors["weight.nested_absmax"]
        planes["absmax"] = absmax.flatten()
        planes["nested_absmax"] = as_bytes(scales.float().reshape(-1, 1))
        planes["absmax_offset"] = as_bytes(torch.tensor([[offset]], dtype=torch.float32, device=device))
    else:
        scales = absmax
        planes["absmax"] = as_bytes(absmax.float().reshape(-1, 1)).flatten()
    if not scales.is_floating_point() or not bool(scales.isfinite().all()):
        raise QuantizationError(f"{name} has scales that are not finite.", where=name)
    for key, spec in format.plane_specs(out_features, in_features).items():
        if planes[key].numel() != prod(spec.shape) or planes[key].dtype != torch.uint8:
            raise QuantizationError(
                f"The size of {key} in {name} does not match the shape of the weight.",
                where=name,
                why=f"expected {prod(spec.shape)} bytes, got {planes[key].numel()} of {planes[key].dtype}",
            )
        planes[key] = planes[key].reshape(spec.shape)
    return format, planes


def _from_int8(tensors: Mapping[str, Tensor], name: str) -> tuple[Format, dict[str, Tensor]]:
    layout = tensors.get("weight_format")
    if layout is not None and (layout.numel() != 1 or layout.item() != 0):
        raise QuantizationError(
            f"{name} is stored in a tiled layout for old GPUs.",
            where=name,
            why=f"weight_format is {layout.flatten()[:4].tolist()}; only 0 (by rows) is portable",
            fix="save the model again with a current bitsandbytes",
        )
    codes, scale = _require_key(tensors, "weight", name), tensors["SCB"]
    if codes.dtype != torch.int8 or codes.dim() != 2 or scale.numel() != len(codes) or not scale.is_floating_point():
        raise QuantizationError(
            f"{name} is not an 8-bit layer of bitsandbytes.",
            where=name,
            why=f"weight is {codes.dtype} {list(codes.shape)}, SCB is {scale.dtype} {list(scale.shape)}",
        )
    if not bool(scale.isfinite().all()):
        raise QuantizationError(f"{name} has scales that are not finite.", where=name)
    return Int8(), {"codes": codes, "scale": as_bytes(scale.float().reshape(-1, 1))}


def _require_key(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise QuantizationError(f"{name} is not a bitsandbytes layer.", where=name, why=f"{key} is missing")
    return tensors[key]


def _require_full_blocks(format: Levels, out_features: int, in_features: int) -> None:
    if in_features % format.block_size:
        raise QuantizationError(
            "A weight whose rows are not a multiple of block_size cannot be converted from or to bitsandbytes.",
            why=f"in bitsandbytes blocks cross rows, in Ingle they do not; in_features = {in_features}, "
            f"block_size = {format.block_size}, weight [{out_features}, {in_features}]",
            fix="choose a block_size that divides in_features, or convert the decoded weight",
        )


def _require_table(table: Tensor, expected: Tensor, name: str) -> None:
    if not torch.equal(table.float().flatten(), expected):
        raise QuantizationError(f"{name} uses another table of levels than bitsandbytes.", where=name)
