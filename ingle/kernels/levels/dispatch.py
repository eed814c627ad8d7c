"""Quantized weights to float tensors and back, by the fastest kernel that the device has.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = blocks in a row, M = nested blocks.

Every function writes into ``out`` and must agree bit for bit with the torch reference of its format in
``ingle.quant``; where ``has_kernel`` says no, that reference is what runs.  Under ``torch.compile`` the same kernels
are opaque operators, so a graph holds packed weights and nothing decoded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor

from ingle.kernels.levels import decode as cpu
from ingle.kernels.levels import encode as cpu_encode
from ingle.kernels.threads import match_threads

#: Integer types that hold the bits of a float type, which numba lacks or does not need.
BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}

#: Weights that are copied at once where an encoder cannot read them as they lie.
COPIED = 1 << 22


def has_kernel(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights beside this tensor can be decoded to ``dtype`` by a kernel; else the reference must do."""
    if isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling():
        return False
    match tensor.device.type:
        case "cpu":
            return dtype in BITS
        case "cuda":
            return dtype in (torch.bfloat16, torch.float16, torch.float32) and _has_triton()
    return False


def decode_levels(codes_OC: Tensor, levels: Tensor, scales_ON: Tensor, block_size: int, out_OI: Tensor) -> Tensor:
    """Decodes 4-bit codes: ``levels[code] * scale``, rounded once to the dtype of ``out_OI``.

    Args:
        codes_OC: uint8, two codes a byte, the even column in the high nibble.
        levels: float32 ``[16]``.
        scales_ON: float32, one for ``block_size`` neighbours in a row.
        block_size: A multiple of 16; the last block of a row may be short.
        out_OI: Contiguous, written.

    Returns:
        ``out_OI``.
    """
    if torch.compiler.is_compiling():
        torch.ops.ingle.decode_levels(codes_OC, levels, scales_ON, block_size, out_OI)
    else:
        _decode_levels(codes_OC, levels, scales_ON, block_size, out_OI)
    return out_OI


def decode_nested_levels(
    codes_OC: Tensor,
    levels: Tensor,
    scale_codes_ON: Tensor,
    scale_levels: Tensor,
    nested_M: Tensor,
    offset: Tensor,
    block_size: int,
    out_OI: Tensor,
) -> Tensor:
    """Decodes 4-bit codes whose scales are packed in 8 bits: ``scale = scale_levels[code] * nested + offset``.

    Args:
        codes_OC: uint8, two codes a byte, the even column in the high nibble.
        levels: float32 ``[16]``.
        scale_codes_ON: uint8, one for ``block_size`` neighbours in a row.
        scale_levels: float32 ``[256]``.
        nested_M: float32, one for 256 consecutive scales of the flattened matrix.
        offset: float32, one element.
        block_size: A multiple of 16; the last block of a row may be short.
        out_OI: Contiguous, written.

    Returns:
        ``out_OI``.
    """
    arguments = (codes_OC, levels, scale_codes_ON, scale_levels, nested_M, offset, block_size, out_OI)
    if torch.compiler.is_compiling():
        torch.ops.ingle.decode_nested_levels(*arguments)
    else:
        _decode_nested_levels(*arguments)
    return out_OI


def decode_int8(codes_OI: Tensor, scales_O: Tensor, out_OI: Tensor) -> Tensor:
    """Decodes signed bytes: ``code * scale * (1 / 127)``, rounded once to the dtype of ``out_OI``.

    Args:
        codes_OI: int8.
        scales_O: float32.
        out_OI: Contiguous, written.

    Returns:
        ``out_OI``.
    """
    if torch.compiler.is_compiling():
        torch.ops.ingle.decode_int8(codes_OI, scales_O, out_OI)
    else:
        _decode_int8(codes_OI, scales_O, out_OI)
    return out_OI


def encode_levels(weight_OI: Tensor, midpoints: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor] | None:
    """Packs a weight on the CPU into 16-level codes and the absmax of every block; None on other devices.

    Args:
        weight_OI: Floating, with any strides.
        midpoints: float32 ``[15]``, between neighbouring levels, ascending.
        order: uint8 ``[16]``, the code of every level, ascending.
        block_size: Weights that share an absmax.

    Returns:
        Codes uint8 ``[O, ceil(I / 2)]`` and absmax float32 ``[O, N]``; not finite where the weight is not.
    """
    if not can_encode(weight_OI):
        return None
    num_rows, num_columns = weight_OI.shape
    codes = torch.empty(num_rows, -(-num_columns // 2), dtype=torch.uint8)
    scales = torch.empty(num_rows, -(-num_columns // block_size), dtype=torch.float32)
    for rows, bits in read_rows(weight_OI):
        arrays = (midpoints.numpy(), order.numpy(), block_size, codes[rows].numpy(), bits_of(scales[rows]))
        cpu_encode.encode_levels(bits, *arrays, match_threads(weight_OI.numel()))
    return codes, scales


def search_bounds(values: Tensor, bounds: Tensor) -> Tensor | None:
    """How many of 255 ascending bounds lie strictly below every float32 value, as uint8; None off the CPU."""
    if not can_encode(values):
        return None
    flat = values.contiguous().flatten()
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    cpu_encode.search_bounds(flat.numpy(), bounds.numpy(), codes.numpy(), match_threads(flat.numel()))
    return codes.view(values.shape)


def encode_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor] | None:
    """Packs a weight on the CPU into signed bytes and the absmax of every row; None on other devices.

    Args:
        weight_OI: Floating, with any strides.

    Returns:
        Codes int8 ``[O, I]`` and absmax float32 ``[O]``; not finite where the weight is not.
    """
    if not can_encode(weight_OI):
        return None
    codes = torch.empty(weight_OI.shape, dtype=torch.int8)
    scales = torch.empty(len(weight_OI), dtype=torch.float32)
    for rows, bits in read_rows(weight_OI):
        cpu_encode.encode_int8(bits, codes[rows].numpy(), bits_of(scales[rows]), match_threads(weight_OI.numel()))
    return codes, scales


def can_encode(weight: Tensor) -> bool:
    """Whether a kernel of the CPU can read a weight."""
    return weight.device.type == "cpu" and weight.is_floating_point() and not isinstance(weight, FakeTensor)


def read_rows(weight: Tensor) -> Iterator[tuple[slice, object]]:
    """The bits of a weight, rows by rows: all at once where they lie ready, else copies of bounded size."""
    ready = weight.is_contiguous() and weight.dtype in BITS
    count = len(weight) if ready else max(1, COPIED // max(1, weight.shape[1]))
    for start in range(0, len(weight), count):
        part = weight[start : start + count].contiguous()
        yield slice(start, start + count), bits_of(part if part.dtype in BITS else part.float())


def _decode_levels(codes: Tensor, levels: Tensor, scales: Tensor, block_size: int, out: Tensor) -> None:
    if out.is_cuda:
        from ingle.kernels.triton.decode import decode_levels as decode_on_gpu

        decode_on_gpu(codes, levels, scales, block_size, out)
        return
    threads = match_threads(out.numel())
    cpu.decode_levels(_array(codes), _array(levels), _array(scales), block_size, bits_of(out), threads)


def _decode_nested_levels(
    codes: Tensor,
    levels: Tensor,
    scale_codes: Tensor,
    scale_levels: Tensor,
    nested: Tensor,
    offset: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    tensors = (codes, levels, scale_codes, scale_levels, nested, offset)
    if out.is_cuda:
        from ingle.kernels.triton.decode import decode_nested_levels as decode_on_gpu

        decode_on_gpu(*tensors, block_size, out)
        return
    arrays = [_array(tensor) for tensor in tensors]
    cpu.decode_nested_levels(*arrays, block_size, bits_of(out), match_threads(out.numel()))


def _decode_int8(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    if out.is_cuda:
        from ingle.kernels.triton.decode import decode_int8 as decode_on_gpu

        decode_on_gpu(codes, scales, out)
        return
    cpu.decode_int8(_array(codes), _array(scales), bits_of(out), match_threads(out.numel()))


# The operators that stand for the kernels in a compiled graph; a fake one has nothing to return.
for _name, _kernel in (
    ("decode_levels", _decode_levels),
    ("decode_nested_levels", _decode_nested_levels),
    ("decode_int8", _decode_int8),
):
    library.custom_op(f"ingle::{_name}", _kernel, mutates_args=("out",)).register_fake(lambda *_: None)


def _array(tensor: Tensor) -> object:
    return _off_graph(tensor).contiguous().numpy()


def bits_of(tensor: Tensor) -> object:
    """The bits of a bfloat16 or float32 tensor, as numba takes them."""
    return _off_graph(tensor).view(BITS[tensor.dtype]).numpy()


def _off_graph(tensor: Tensor) -> Tensor:
    """The tensor without its history; ``detach`` alone takes longer than all else around a small kernel."""
    return tensor.detach() if tensor.requires_grad else tensor


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
