"""Converts layers from and to the tensors of the ``hqq`` package, as in its ``HQQLinear.state_dict``.

Legend: O = rows, I = columns, G = weights of a group, R = O I / G groups of the matrix in row-major order.

=================== =============================================================================================
key                 content (after the layer's name and ``.``)
=================== =============================================================================================
W_q                 codes of the groups ``[R, G]``, stored along R in stripes: with ``k`` codes per byte, byte ``r``
                    holds group ``r`` in its highest bits, then ``r + R / k``, ``r + 2 R / k``, ...; 3-bit codes are
                    stored ten per int32, from bit 27 down, with R padded to a multiple of ten
scale, zero         float ``[R, 1]``; a weight is ``(code - zero) * scale``
nbits, group_size,  int32
axis
shape               int64 ``[O, I]``
packing,            names as bytes of text: of the layout above, of the dtype to view ``W_q`` as, and of the dtype
unpack_view_dtype,  that weights are decoded to
compute_dtype
others              uint8 flags that describe how the package quantized the weight
=================== =============================================================================================

Scales and zeros must be representable in float16. Text is only compared with known names; the package itself evaluates
it as Python.

Source: the ``hqq`` package 0.2.8, ``core/quantize.py``, ``core/bitpack.py``, ``core/utils.py`` (Apache 2 license).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from ingle.config.base import HqqBase
from ingle.errors import QuantizationError
from ingle.quant.hqq import Hqq, bytes_to_codes, codes_to_bytes
from ingle.quant.plane import as_bytes, as_float16

#: The package's names for its layouts, by bits.
LAYOUTS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
#: Codes per stored number, by bits.
STRIPES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
#: Required keys.
REQUIRED = ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape")


def to_hqq(
    planes: Mapping[str, Tensor],
    format: Hqq,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """Returns the tensors of a layer by the keys of the package (see the module), without the layer's name.

    Args:
        planes: As ``format.plane_specs`` lists them.
        format: Format of the planes.
        out_features: O.
        in_features: I.
        dtype: The dtype that the package computes in. Scales and zeros stay float16.

    Raises:
        QuantizationError: Rows are not a multiple of the group size, or the number of groups does not fill stripes.
    """
    _require_full_groups(format, out_features, in_features, "weight")
    codes = bytes_to_codes(planes["codes"], format.bits, in_features).reshape(-1, format.group_size)
    if format.bits != 3 and len(codes) % STRIPES[format.bits]:
        raise QuantizationError(
            f"The hqq package stores groups in multiples of {STRIPES[format.bits]}; this weight has {len(codes)}.",
            why=f"weight [{out_features}, {in_features}], groups of {format.group_size}",
            fix="convert the decoded weight",
        )
    view = torch.int32 if format.bits == 3 else torch.uint8
    meta: dict[str, Any] = {
        "nbits": format.bits,
        "group_size": format.group_size,
        "axis": 1,
        "packing": LAYOUTS[format.bits],
        "unpack_view_dtype": str(view),
        "compute_dtype": str(dtype),
        **{"view_as_float": False, "quant_scale": False, "quant_zero": False, "offload_meta": False},
        **{"channel_wise": True, "optimize": True, "round_zero": False},
        **{"encoded_state_dict": True, "stores_quant_config": True},
    }
    tensors = {key: _to_tensor(value) for key, value in meta.items()}
    tensors["shape"] = torch.tensor([out_features, in_features])
    tensors["W_q"] = codes_to_stripes(codes, format.bits)
    for key in ("scale", "zero"):
        tensors[key] = as_float16(planes[key]).reshape(-1, 1)
    return tensors


def from_hqq(tensors: Mapping[str, Tensor], *, name: str = "weight") -> tuple[Hqq, dict[str, Tensor]]:
    """Returns the format and planes of a layer of an HQQ checkpoint.

    Args:
        tensors: By the keys of the package (see the module), without the layer's name; a bias is ignored.
        name: The layer's name for errors.

    Raises:
        QuantizationError: The layer is of an unsupported kind, or its tensors contradict each other.
    """
    missing = [key for key in REQUIRED if key not in tensors]
    if missing:
        raise QuantizationError(f"{name} is not an HQQ layer.", where=name, why=f"missing: {', '.join(missing)}")
    bits, size, axis = (_read_number(tensors[key]) for key in ("nbits", "group_size", "axis"))
    sizes = get_args(HqqBase.model_fields["group_size"].annotation)
    if axis != 1 or bits not in LAYOUTS or size not in sizes:
        raise QuantizationError(
            f"{name} uses an unsupported variant of HQQ.",
            where=name,
            why=f"nbits {bits:g}, group_size {size:g}, axis {axis:g}; supported are axis 1, nbits {sorted(LAYOUTS)} "
            f"and group_size {list(sizes)}",
            fix="convert the decoded weight",
        )
    if "packing" in tensors and not torch.equal(tensors["packing"].flatten(), _to_tensor(LAYOUTS[int(bits)])):
        raise QuantizationError(f"The packing of {name} does not match its {bits:g} bits.", where=name)
    shape = tensors["shape"].flatten().tolist()
    if len(shape) != 2 or any(type(count) is not int or not 0 < count < 2**31 for count in shape):
        raise QuantizationError(f"The shape of {name} is invalid: {shape[:4]}.", where=name)
    out_features, in_features = shape
    format = Hqq(bits=int(bits), group_size=int(size))
    _require_full_groups(format, out_features, in_features, name)
    num_groups = out_features * in_features // format.group_size
    stripes = _view_stripes(tensors["W_q"], format, num_groups, name)
    codes = stripes_to_codes(stripes, format.bits)[:num_groups].reshape(out_features, in_features)
    planes = {"codes": codes_to_bytes(codes, format.bits)}
    for key in ("scale", "zero"):
        planes[key] = as_bytes(_to_float16(tensors[key], num_groups, f"{name}.{key}").reshape(out_features, -1))
    return format, planes


def codes_to_stripes(codes_RG: Tensor, bits: int) -> Tensor:
    """Stores uint8 codes in the package's layout: uint8, or int32 for three bits."""
    if bits == 3:
        codes_RG = torch.nn.functional.pad(codes_RG, (0, 0, 0, -len(codes_RG) % STRIPES[bits])).int()
    stripes = codes_RG.unflatten(0, (STRIPES[bits], -1))
    data: Tensor = stripes[0]
    for stripe in stripes[1:]:
        data = (data << bits) | stripe
    return data.contiguous()


def stripes_to_codes(stripes: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`codes_to_stripes`, uint8; with three bits the result keeps the padding."""
    shifts = range(bits * (STRIPES[bits] - 1), -1, -bits)
    return torch.cat([((stripes >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])


def _view_stripes(stripes: Tensor, format: Hqq, num_groups: int, name: str) -> Tensor:
    """Views ``W_q`` in its own dtype; the package may have saved it viewed as floats."""
    view = torch.int32 if format.bits == 3 else torch.uint8
    stripes = stripes.contiguous()
    # A view changes the last dimension, so there must be one, and its bytes must be a multiple of the new item size.
    if stripes.dim() == 2 and stripes.shape[1] * stripes.itemsize % view.itemsize == 0:
        stripes = stripes.view(view)
    expected = (-(-num_groups // STRIPES[format.bits]), format.group_size)
    is_full = format.bits == 3 or num_groups % STRIPES[format.bits] == 0
    if not is_full or stripes.dtype != view or tuple(stripes.shape) != expected:
        why = f"expected {list(expected)} of {view}, got {list(stripes.shape)} of {stripes.dtype}"
        raise QuantizationError(f"The size of the codes in {name} does not match its shape.", where=name, why=why)
    return stripes


def _to_float16(values: Tensor, num_groups: int, name: str) -> Tensor:
    """Returns scales or zeros as float16; an error if that would change them."""
    halves = values.half()
    if values.numel() != num_groups or not values.is_floating_point():
        why = f"expected {num_groups} floats, got {list(values.shape)} {values.dtype}"
        raise QuantizationError(f"{name} does not match the shape of its layer.", where=name, why=why)
    if not bool(halves.isfinite().all()) or not torch.equal(halves.double(), values.double()):
        raise QuantizationError(
            f"{name} contains numbers that float16 cannot represent.",
            where=name,
            why=f"its dtype is {values.dtype}; HQQ stores scales and zeros in its compute dtype",
            fix="save the model from hqq with compute_dtype=torch.float16",
        )
    return halves


def _read_number(tensor: Tensor) -> float:
    return float(tensor.item()) if tensor.numel() == 1 else float("nan")


def _to_tensor(value: bool | int | str) -> Tensor:
    """Encodes a flag, a number or a text as the package does."""
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def _require_full_groups(format: Hqq, out_features: int, in_features: int, name: str) -> None:
    if in_features % format.group_size:
        raise QuantizationError(
            f"Rows of {name} are not a multiple of group_size, so it cannot be converted from or to the hqq package.",
            where=name,
            why=f"in hqq groups cross rows, in Ingle they do not; in_features = {in_features}, "
            f"group_size = {format.group_size}, weight [{out_features}, {in_features}]",
            fix="choose a group_size that divides in_features, or convert the decoded weight",
        )
