"""The half-quadratic solver that HQQ published: scales by minimum and maximum, zeros by proximal steps.

Legend: O = rows, N = groups in a row, G = weights of a group.

It minimises ``|W - Wr|_p^p`` with p = 0.7 over the zero ``z`` alone, for ``Wr = (q - z) / s``::

    s = top / (max - min),  z = -min * s          (rounded for 4 bits)
    q = clamp(round(W * s + z), 0, top)
    E = shrink(W - Wr),  shrink(x) = sign(x) * relu(|x| - |x|^(p - 1) / beta)
    z = mean(q - (W - E) * s),  beta = 1.01 * beta

from beta = 10 for 20 steps at most; it ends one step after the mean of ``|W - Wr|`` fell no more, as the package's
default does.  Every row is solved as a matrix of its own: HQQ's mean runs over all of the matrix, which would make the
bytes of a row depend on other rows.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; the ``hqq`` package 0.2.8,
``Quantizer.quantize`` and ``optimize_weights_proximal_legacy`` with ``axis=1`` (Apache 2 licence).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The exponent of the norm.
NORM = 0.7
#: The first weight of the proximal term, what it grows by, and the most steps.
BETA, GROWTH, STEPS = 10.0, 1.01, 20
#: Ranges up to this count as nothing, and inverse scales end here.
TINIEST, STEEPEST = 1e-4, 2e4


def solve(weight_ONG: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero.

    Args:
        weight_ONG: float32.
        bits: Of a code.

    Returns:
        Codes ``[O, N, G]`` as float32, the scale ``1 / s`` and the zero ``[O, N, 1]`` as float32.
    """
    top = float(2**bits - 1)
    low, high = weight_ONG.aminmax(dim=2, keepdim=True)
    spread = high - low
    inverse = torch.where(spread <= TINIEST, torch.ones_like(spread), top / spread).clamp(max=STEEPEST)
    zero = -low * inverse
    if bits == 4:
        zero = zero.round()
    beta = BETA
    best = weight_ONG.new_full((len(weight_ONG), 1, 1), torch.inf, dtype=torch.float64)
    going = torch.ones_like(best, dtype=torch.bool)
    for _ in range(STEPS):
        codes = (weight_ONG * inverse + zero).round().clamp(0, top)
        error = weight_ONG - (codes - zero) / inverse
        kept = _shrink(error, beta)
        fresh = (codes - (weight_ONG - kept) * inverse).mean(dim=2, keepdim=True)
        zero = torch.where(going, fresh, zero)
        mean = error.abs().double().mean(dim=(1, 2), keepdim=True)
        going &= mean < best
        best = torch.where(going, mean, best)
        beta *= GROWTH
        if not bool(going.any()):
            break
    return (weight_ONG * inverse + zero).round().clamp(0, top), 1.0 / inverse, zero


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal map of the p-norm."""
    size = error.abs()
    return error.sign() * (size - size.pow(NORM - 1) / beta).clamp(min=0)
