"""The ``hqq`` package's tensors in and out: what its ``HQQLinear.state_dict`` holds, in safetensors.

Legend: O = rows, I = columns, G = weights of a group, R = O I / G groups of the matrix, one after the other.

=================== =============================================================================================
key                 content (after the layer's name and ``.``)
=================== =============================================================================================
W_q                 codes of the groups ``[R, G]``, packed along R in stripes: with ``k`` codes to a byte, byte ``r``
                    holds group ``r`` in its highest bits, then ``r + R / k``, ``r + 2 R / k``, ...; three bits go
                    ten to an int32, from bit 27 down, R being filled up to tens
scale, zero         float ``[R, 1]``; a weight is ``(code - zero) * scale``
nbits, group_size,  int32
axis
shape               int64 ``[O, I]``
packing,            names as bytes of text: of the packing above, of what ``W_q`` is to be viewed as, and of the dtype
unpack_view_dtype,  that a weight is decoded to
compute_dtype
others              flags as uint8, which say how the package came to the weight
=================== =============================================================================================

Codes are copied, never found anew, and scales and zeros must be held by float16.  Text is compared with known names:
the package itself evaluates it as Python.

Source: the ``hqq`` package 0.2.8, ``core/quantize.py``, ``core/bitpack.py``, ``core/utils.py`` (Apache 2 licence).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from ingle.config.base import HqqBase
from ingle.errors import QuantizationError
from ingle.quant.hqq import Hqq, pack_codes, unpack_codes
from ingle.quant.plane import as_bytes, as_float16

#: The package's names for its packings.
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
#: Codes to a packed number.
STRIPES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
#: Keys without which there is no layer.
NEEDED = ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape")


def to_hqq(
    planes: Mapping[str, Tensor],
    format: Hqq,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """A layer's tensors under the package's keys (see the module), without the layer's name.

    Args:
        planes: As ``format.plane_specs`` lists them.
        format: Of the planes.
        out_features: O.
        in_features: I.
        dtype: What the package shall compute in; scales and zeros stay float16.

    Raises:
        QuantizationError: The package cannot hold such rows or so few groups.
    """
    _require_groups(format, out_features, in_features, "weight")
    codes = unpack_codes(planes["codes"], format.bits, in_features).reshape(-1, format.group_size)
    if format.bits != 3 and len(codes) % STRIPES[format.bits]:
        raise QuantizationError(
            f"The hqq package packs {STRIPES[format.bits]} groups together; here are {len(codes)}.",
            why=f"weight [{out_features}, {in_features}], groups of {format.group_size}",
            fix="exchange the decoded weight",
        )
    view = torch.int32 if format.bits == 3 else torch.uint8
    meta: dict[str, Any] = {
        "nbits": format.bits,
        "group_size": format.group_size,
        "axis": 1,
        "packing": PACKINGS[format.bits],
        "unpack_view_dtype": str(view),
        "compute_dtype": str(dtype),
        **{"view_as_float": False, "quant_scale": False, "quant_zero": False, "offload_meta": False},
        **{"channel_wise": True, "optimize": True, "round_zero": False},
        **{"encoded_state_dict": True, "stores_quant_config": True},
    }
    tensors = {key: _encode(value) for key, value in meta.items()}
    tensors["shape"] = torch.tensor([out_features, in_features])
    tensors["W_q"] = pack_stripes(codes, format.bits)
    for key in ("scale", "zero"):
        tensors[key] = as_float16(planes[key]).reshape(-1, 1)
    return tensors


def from_hqq(tensors: Mapping[str, Tensor], *, name: str = "weight") -> tuple[Hqq, dict[str, Tensor]]:
    """The format and planes of one layer of an HQQ checkpoint; codes are copied, never found anew.

    Args:
        tensors: By the package's keys (see the module), without the layer's name; a bias is ignored.
        name: The layer's name, for errors.

    Raises:
        QuantizationError: The layer is of a kind that Ingle does not hold, or its tensors contradict one another.
    """
    missing = [key for key in NEEDED if key not in tensors]
    if missing:
        raise QuantizationError(f"{name} is no layer of hqq.", where=name, why=f"there is no {', '.join(missing)}")
    bits, size, axis = (_read_number(tensors[key]) for key in ("nbits", "group_size", "axis"))
    sizes = get_args(HqqBase.model_fields["group_size"].annotation)
    if axis != 1 or bits not in PACKINGS or size not in sizes:
        raise QuantizationError(
            f"{name} is packed by hqq in a way that Ingle does not hold.",
            where=name,
            why=f"nbits {bits:g}, group_size {size:g}, axis {axis:g}; need axis 1, nbits in {sorted(PACKINGS)}, "
            f"group_size in {list(sizes)}",
            fix="exchange the decoded weight",
        )
    if "packing" in tensors and not torch.equal(tensors["packing"].flatten(), _encode(PACKINGS[int(bits)])):
        raise QuantizationError(f"{name} has a packing that is not that of {bits:g} bits.", where=name)
    shape = tensors["shape"].flatten().tolist()
    if len(shape) != 2 or any(type(count) is not int or not 0 < count < 2**31 for count in shape):
        raise QuantizationError(f"{name} has no shape of two sizes: {shape[:4]}.", where=name)
    out_features, in_features = shape
    format = Hqq(bits=int(bits), group_size=int(size))
    _require_groups(format, out_features, in_features, name)
    num_groups = out_features * in_features // format.group_size
    packed = _view_packed(tensors["W_q"], format, num_groups, name)
    codes = unpack_stripes(packed, format.bits)[:num_groups].reshape(out_features, in_features)
    planes = {"codes": pack_codes(codes, format.bits)}
    for key in ("scale", "zero"):
        planes[key] = as_bytes(_read_halves(tensors[key], num_groups, f"{name}.{key}").reshape(out_features, -1))
    return format, planes


def pack_stripes(codes_RG: Tensor, bits: int) -> Tensor:
    """Codes uint8 to the package's numbers: uint8, or int32 for three bits."""
    if bits == 3:
        codes_RG = torch.nn.functional.pad(codes_RG, (0, 0, 0, -len(codes_RG) % STRIPES[bits])).int()
    stripes = codes_RG.unflatten(0, (STRIPES[bits], -1))
    packed: Tensor = stripes[0]
    for stripe in stripes[1:]:
        packed = (packed << bits) | stripe
    return packed.contiguous()


def unpack_stripes(packed: Tensor, bits: int) -> Tensor:
    """What ``pack_stripes`` packed, uint8; with three bits there may be more groups than were packed."""
    shifts = range(bits * (STRIPES[bits] - 1), -1, -bits)
    return torch.cat([((packed >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])


def _view_packed(packed: Tensor, format: Hqq, num_groups: int, name: str) -> Tensor:
    """``W_q`` in its own dtype: the package may have stored it viewed as floats."""
    view = torch.int32 if format.bits == 3 else torch.uint8
    packed = packed.contiguous()
    # The last dimension is what is viewed, so it must be there and its bytes must fill whole numbers.
    if packed.dim() == 2 and packed.shape[1] * packed.itemsize % view.itemsize == 0:
        packed = packed.view(view)
    need = (-(-num_groups // STRIPES[format.bits]), format.group_size)
    whole = format.bits == 3 or num_groups % STRIPES[format.bits] == 0
    if not whole or packed.dtype != view or tuple(packed.shape) != need:
        why = f"need {list(need)} of {view}, got {list(packed.shape)} of {packed.dtype}"
        raise QuantizationError(f"{name} has codes of another size than its shape asks for.", where=name, why=why)
    return packed


def _read_halves(values: Tensor, num_groups: int, name: str) -> Tensor:
    """Scales or zeros as float16, unchanged."""
    halves = values.half()
    if values.numel() != num_groups or not values.is_floating_point():
        why = f"need {num_groups} floats, got {list(values.shape)} {values.dtype}"
        raise QuantizationError(f"{name} does not fit the shape of its layer.", where=name, why=why)
    if not bool(halves.isfinite().all()) or not torch.equal(halves.double(), values.double()):
        raise QuantizationError(
            f"{name} holds numbers that float16 does not.",
            where=name,
            why=f"it is held in {values.dtype}; HQQ keeps scales and zeros in its compute dtype",
            fix="save the model from hqq with compute_dtype=torch.float16",
        )
    return halves


def _read_number(tensor: Tensor) -> float:
    return float(tensor.item()) if tensor.numel() == 1 else float("nan")


def _encode(value: bool | int | str) -> Tensor:
    """As the package encodes what is no tensor."""
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def _require_groups(format: Hqq, out_features: int, in_features: int, name: str) -> None:
    if in_features % format.group_size:
        raise QuantizationError(
            f"The hqq package lets groups run across rows in {name}; Ingle's never do.",
            where=name,
            why=f"in_features = {in_features} is no multiple of group_size = {format.group_size} "
            f"(weight [{out_features}, {in_features}])",
            fix="choose a group_size that divides in_features, or exchange the decoded weight",
        )
