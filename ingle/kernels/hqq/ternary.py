"""Encodes ternary codes on the CPU.

They are decoded by :mod:`ingle.kernels.hqq.dispatch`, as codes of two bits with zero 1.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = groups in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingle.kernels.levels import encode as cpu_encode
from ingle.kernels.levels.dispatch import bits_of, can_encode, read_rows
from ingle.kernels.threads import match_threads


def measure_groups(weight_OI: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a scale is made from; None off the CPU.

    Args:
        weight_OI: Floating, with any strides.
        size: Weights of a group; the last of a row may be short.

    Returns:
        Of every group ``[O, N]`` the sum of sizes in float64, the least size that is not zero (infinity where all
        are) and the largest, both float32; not finite where a weight is not.
    """
    if not can_encode(weight_OI):
        return None
    num_rows, num_columns = weight_OI.shape
    shape = num_rows, -(-num_columns // size)
    total = torch.empty(shape, dtype=torch.float64)
    least, most = torch.empty(shape), torch.empty(shape)
    for rows, bits in read_rows(weight_OI):
        arrays = total[rows].numpy(), bits_of(least[rows]), bits_of(most[rows])
        cpu_encode.measure_groups(bits, size, *arrays, match_threads(weight_OI.numel()))
    return total, least, most


def encode_ternary(weight_OI: Tensor, limit_ON: Tensor, size: int) -> Tensor | None:
    """Codes uint8 ``[O, C]``: 2 above the limit of the group, 0 below minus the limit, else 1; None off the CPU.

    Args:
        weight_OI: Floating, with any strides.
        limit_ON: float32.
        size: Weights of a group, a multiple of four; the last of a row may be short.
    """
    if not can_encode(weight_OI):
        return None
    codes = torch.empty(len(weight_OI), -(-weight_OI.shape[1] // 4), dtype=torch.uint8)
    limit_ON = limit_ON.contiguous()
    for rows, bits in read_rows(weight_OI):
        arrays = limit_ON[rows].numpy(), size, codes[rows].numpy()
        cpu_encode.encode_ternary(bits, *arrays, match_threads(weight_OI.numel()))
    return codes
