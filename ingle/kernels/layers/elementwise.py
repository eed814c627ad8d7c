"""RMSNorm, SwiGLU and rotary positions, forward and backward, each in one pass over memory.

As separate operators they read and write each activation several times, which on a CPU costs up to a third as much as
the products. Each function takes floats, computes in float32 and rounds once: by numba on a CPU (float32 and bfloat16),
by Triton on a CUDA device, and by torch elsewhere.

Legend: N tokens, H hidden or heads, I intermediate, D size of a head.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import bits, exp, load, store, supported
from ingle.kernels.threads import match_threads


def rms_norm(h_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns ``h / sqrt(mean(h^2) + eps) * weight``.

    Returns:
        The normalized rows [N, H] in the dtype of ``h``, and ``1 / sqrt(mean(h^2) + eps)``, float32 [N].

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    if supported(h_NH, weight_H):
        match_threads(h_NH.numel())
        x_NH = torch.empty_like(h_NH, memory_format=torch.contiguous_format)
        rstd_N = torch.empty(len(h_NH), dtype=torch.float32)
        normalize_rows(bits(h_NH), bits(weight_H), np.float32(eps), bits(x_NH), rstd_N.numpy())
        return x_NH, rstd_N
    if on_gpu(h_NH, weight_H):
        from ingle.kernels.triton import elementwise as gpu

        return gpu.rms_norm(h_NH, weight_H, eps)
    wide_NH = h_NH.float()
    rstd_N = torch.rsqrt(wide_NH.square().mean(-1) + eps)
    return (wide_NH * rstd_N[:, None] * weight_H.float()).to(h_NH.dtype), rstd_N


def recompute_rms_norm(h_NH: Tensor, weight_H: Tensor, rstd_N: Tensor) -> Tensor:
    """Recomputes the normalized rows of :func:`rms_norm`, bit for bit, from its second result."""
    if supported(h_NH, weight_H):
        match_threads(h_NH.numel())
        x_NH = torch.empty_like(h_NH, memory_format=torch.contiguous_format)
        _recompute_rms_norm(bits(h_NH), bits(weight_H), rstd_N.numpy(), bits(x_NH))
        return x_NH
    if on_gpu(h_NH, weight_H):
        from ingle.kernels.triton import elementwise as gpu

        return gpu.recompute_rms_norm(h_NH, weight_H, rstd_N)
    return (h_NH.float() * rstd_N[:, None] * weight_H.float()).to(h_NH.dtype)


def rms_norm_backward_(
    grad_x_NH: Tensor, h_NH: Tensor, weight_H: Tensor, rstd_N: Tensor, residual_NH: Tensor | None = None
) -> Tensor:
    """Returns the gradient of ``h`` from that of the normalized rows; the weight is frozen.

    Args:
        grad_x_NH: Gradient of the normalized rows; overwritten by the result.
        h_NH: The norm's input.
        weight_H: The norm's weight.
        rstd_N: Second result of :func:`rms_norm`.
        residual_NH: Gradient of ``h`` along the residual connection, added to the result.

    Returns:
        ``grad_x``, now the gradient of ``h``.
    """
    if supported(grad_x_NH, h_NH, weight_H):
        match_threads(h_NH.numel())
        rest = grad_x_NH[:0] if residual_NH is None else residual_NH
        _rms_norm_backward(bits(grad_x_NH), bits(h_NH), bits(weight_H), rstd_N.numpy(), bits(rest))
        return grad_x_NH
    if on_gpu(grad_x_NH, h_NH, weight_H, *(() if residual_NH is None else (residual_NH,))):
        from ingle.kernels.triton import elementwise as gpu

        return gpu.rms_norm_backward_(grad_x_NH, h_NH, weight_H, rstd_N, residual_NH)
    normed_NH = h_NH.float() * rstd_N[:, None]
    weighted_NH = grad_x_NH.float() * weight_H.float()
    grad_NH = (weighted_NH - normed_NH * (weighted_NH * normed_NH).mean(-1, keepdim=True)) * rstd_N[:, None]
    return grad_x_NH.copy_(grad_NH if residual_NH is None else grad_NH + residual_NH.float())


def swiglu(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """Returns ``silu(gate) * up``.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    """
    if supported(gate_NI, up_NI):
        match_threads(gate_NI.numel())
        out_NI = torch.empty_like(gate_NI)
        _swiglu(bits(gate_NI), bits(up_NI), bits(out_NI))
        return out_NI
    if on_gpu(gate_NI, up_NI):
        from ingle.kernels.triton import elementwise as gpu

        return gpu.swiglu(gate_NI, up_NI)
    return (torch.nn.functional.silu(gate_NI.float()) * up_NI.float()).to(gate_NI.dtype)


def swiglu_backward_(grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor) -> None:
    """Overwrites the gradient of the output by the output, and gate and up by their gradients.

    No additional buffer is needed where the layer is widest.
    """
    if supported(grad_NI, gate_NI, up_NI):
        match_threads(gate_NI.numel())
        _swiglu_backward(bits(grad_NI), bits(gate_NI), bits(up_NI))
        return
    if on_gpu(grad_NI, gate_NI, up_NI):
        from ingle.kernels.triton import elementwise as gpu

        gpu.swiglu_backward_(grad_NI, gate_NI, up_NI)
        return
    grad, gate, up = grad_NI.float(), gate_NI.float(), up_NI.float()
    sigmoid = torch.sigmoid(gate)
    results = (gate * sigmoid * up, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid)
    for buffer, result in zip((grad_NI, gate_NI, up_NI), results, strict=True):
        buffer.copy_(result)


def rotate(source_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, *, back: bool = False) -> Tensor:
    """Rotates pairs ``(a, b)`` of the two halves of each head to ``(a cos - b sin, b cos + a sin)``.

    :mod:`ingle.kernels.attention.layout` does this on a CPU while it moves rows.

    Args:
        source_NHD: Queries or keys; any strides over N and H.
        cos_ND: Contiguous.
        sin_ND: Contiguous.
        back: Whether to apply the transpose instead, which maps the gradient of the result to that of the source.

    Returns:
        A contiguous tensor [N, H, D].

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34, with the pairs of transformers' Llama.
    """
    if on_gpu(cos_ND, sin_ND) and source_NHD.stride(2) == 1:
        from ingle.kernels.triton import elementwise as gpu

        return gpu.rotate(source_NHD, cos_ND, sin_ND, back=back)
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        tensor.float().chunk(2, -1) for tensor in (source_NHD, cos_ND[:, None], sin_ND[:, None])
    )
    halves = (a * cos_a + b * sin_b, b * cos_b - a * sin_a) if back else (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    return torch.cat(halves, -1).to(source_NHD.dtype)


def on_gpu(*tensors: Tensor) -> bool:
    """Returns whether the Triton kernels can take these tensors."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    fits = all(t.is_cuda and t.is_contiguous() and t.dtype in floats for t in tensors)
    return fits and importlib.util.find_spec("triton") is not None


@compile_float_kernel
def normalize_rows(h, weight, eps, x, rstd):  # type: ignore[no-untyped-def]
    """Computes :func:`rms_norm`."""
    num_rows, width = h.shape
    for i in prange(num_rows):
        row, out = h[i], x[i]
        total = np.float32(0.0)
        for j in range(width):
            value = load(row, j)
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + eps)
        rstd[i] = scale
        for j in range(width):
            store(out, j, load(row, j) * scale * load(weight, j))


@compile_float_kernel
def _recompute_rms_norm(h, weight, rstd, x):  # type: ignore[no-untyped-def]
    num_rows, width = h.shape
    for i in prange(num_rows):
        row, out, scale = h[i], x[i], rstd[i]
        for j in range(width):
            store(out, j, load(row, j) * scale * load(weight, j))


@compile_float_kernel
def _rms_norm_backward(grad, h, weight, rstd, residual):  # type: ignore[no-untyped-def]
    num_rows, width = h.shape
    for i in prange(num_rows):
        g, row, scale = grad[i], h[i], rstd[i]
        dot = np.float32(0.0)
        for j in range(width):
            dot += load(g, j) * load(weight, j) * load(row, j)
        shrink = dot * scale * scale * scale / np.float32(width)
        if len(residual) > 0:
            rest = residual[i]
            for j in range(width):
                store(g, j, load(g, j) * load(weight, j) * scale - load(row, j) * shrink + load(rest, j))
        else:
            for j in range(width):
                store(g, j, load(g, j) * load(weight, j) * scale - load(row, j) * shrink)


@compile_float_kernel
def _swiglu(gate, up, out):  # type: ignore[no-untyped-def]
    num_rows, width = gate.shape
    for i in prange(num_rows):
        e, g, h = gate[i], up[i], out[i]
        for j in range(width):
            value = load(e, j)
            store(h, j, value / (np.float32(1.0) + exp(-value)) * load(g, j))


@compile_float_kernel
def _swiglu_backward(grad, gate, up):  # type: ignore[no-untyped-def]
    num_rows, width = gate.shape
    for i in prange(num_rows):
        d, e, g = grad[i], gate[i], up[i]
        for j in range(width):
            dh, value, other = load(d, j), load(e, j), load(g, j)
            sigmoid = np.float32(1.0) / (np.float32(1.0) + exp(-value))
            silu = value * sigmoid
            store(d, j, silu * other)
            store(e, j, dh * other * sigmoid * (np.float32(1.0) + value * (np.float32(1.0) - sigmoid)))
            store(g, j, dh * silu)
