"""Decoders of quantized weights on a CUDA device, in Triton, which torch for GPUs includes.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = blocks in a row.

A program decodes some blocks of one row. Fused multiply-adds are disabled, because a nested scale is a product and a
sum that are each rounded, as in the reference and in bitsandbytes. The speed on a GPU has not been measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Number of bytes of codes that one program decodes, but at least one block.
TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def round_to(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds float32 to nearest, ties to even; bfloat16 by its bits, because Triton's interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _store_levels(  # type: ignore[no-untyped-def]
    codes, levels, scale, out, row, block,
    num_bytes, num_columns, HALF: tl.constexpr,
):  # fmt: skip
    """Decodes blocks ``[BLOCKS]`` of a row, ``HALF`` bytes each, with scales ``[BLOCKS]``."""
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    raw = tl.load(codes + row * num_bytes + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    even = tl.load(levels + (raw >> 4)) * scale[:, None]
    odd = tl.load(levels + (raw & 15)) * scale[:, None]
    value = tl.interleave(even, odd)
    column = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + row * num_columns + column, round_to(value, out.dtype.element_ty), mask=column < num_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_levels(  # type: ignore[no-untyped-def]
    codes, levels, scales, out,
    num_blocks, num_bytes, num_columns, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(scales + row * num_blocks + block, mask=block < num_blocks, other=0.0)
    _store_levels(codes, levels, scale, out, row, block, num_bytes, num_columns, HALF)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_nested_levels(  # type: ignore[no-untyped-def]
    codes, levels, scale_codes, scale_levels, nested, offset, out,
    num_blocks, num_bytes, num_columns, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    place = row * num_blocks + block
    level = tl.load(scale_levels + tl.load(scale_codes + place, mask=inside, other=0).to(tl.int32))
    scale = level * tl.load(nested + place // 256, mask=inside, other=0.0) + tl.load(offset)
    _store_levels(codes, levels, scale, out, row, block, num_bytes, num_columns, HALF)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_int8(  # type: ignore[no-untyped-def]
    codes, scales, out, num_columns, reciprocal, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    code = tl.load(codes + row * num_columns + column, mask=column < num_columns, other=0).to(tl.float32)
    value = code * tl.load(scales + row) * reciprocal
    tl.store(out + row * num_columns + column, round_to(value, out.dtype.element_ty), mask=column < num_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_groups(  # type: ignore[no-untyped-def]
    codes, scales, zeros, out, num_groups, num_bytes, num_columns,
    BITS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    byte = column * BITS // 8
    word = tl.load(codes + row * num_bytes + byte, mask=inside, other=0).to(tl.int32)
    if BITS == 3:  # only these codes cross into the next byte
        rest = tl.load(codes + row * num_bytes + byte + 1, mask=byte + 1 < num_bytes, other=0).to(tl.int32)
        word = word | (rest << 8)
    code = (word >> (column * BITS % 8)) & ((1 << BITS) - 1)
    place = row * num_groups + column // SIZE
    scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zeros + place, mask=inside, other=0.0).to(tl.float32)
    value = (code.to(tl.float32) - zero) * scale
    tl.store(out + row * num_columns + column, round_to(value, out.dtype.element_ty), mask=inside)


def decode_levels(codes: Tensor, levels: Tensor, scales: Tensor, block_size: int, out: Tensor) -> None:
    """Like ``ingle.kernels.levels.dispatch.decode_levels``."""
    grid, sizes, tile = _plan(codes, scales, block_size, out)
    with torch.cuda.device_of(out):
        _decode_levels[grid](codes, levels, scales, out, *sizes, **tile)


def decode_nested_levels(
    codes: Tensor,
    levels: Tensor,
    scale_codes: Tensor,
    scale_levels: Tensor,
    nested: Tensor,
    offset: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Like ``ingle.kernels.levels.dispatch.decode_nested_levels``."""
    grid, sizes, tile = _plan(codes, scale_codes, block_size, out)
    with torch.cuda.device_of(out):
        _decode_nested_levels[grid](codes, levels, scale_codes, scale_levels, nested, offset, out, *sizes, **tile)


def decode_int8(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Like ``ingle.kernels.levels.dispatch.decode_int8``."""
    num_rows, num_columns = out.shape
    grid = (num_rows, triton.cdiv(num_columns, TILE))
    with torch.cuda.device_of(out):
        _decode_int8[grid](codes, scales, out, num_columns, 7.874015718698502e-3, COLUMNS=TILE, enable_fp_fusion=False)


def decode_groups(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int, out: Tensor) -> None:
    """Like ``ingle.kernels.hqq.dispatch.decode_groups``."""
    num_rows, num_columns = out.shape
    grid = (num_rows, triton.cdiv(num_columns, TILE))
    sizes = scales.shape[1], codes.shape[1], num_columns
    constants = {"BITS": bits, "SIZE": size, "COLUMNS": TILE, "enable_fp_fusion": False}
    with torch.cuda.device_of(out):
        _decode_groups[grid](codes, scales, zeros, out, *sizes, **constants)


def _plan(
    codes: Tensor, scales: Tensor, block_size: int, out: Tensor
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """Returns grid, sizes and tile of a launch."""
    num_blocks = scales.shape[1]
    half = block_size // 2
    blocks = max(1, min(TILE // half, triton.next_power_of_2(num_blocks)))
    tile = {"HALF": half, "BLOCKS": blocks, "enable_fp_fusion": False}
    return (out.shape[0], triton.cdiv(num_blocks, blocks)), (num_blocks, codes.shape[1], out.shape[1]), tile
