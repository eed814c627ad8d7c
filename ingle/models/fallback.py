"""Packed attention one document at a time, until the kernels package brings its own."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention within each document: ``[1, Hq, N, Dh]`` -> ``[1, N, Hq, Dh]``."""
    groups = query.shape[1] // key.shape[1]
    bounds = cu_seqlens.tolist()
    outputs = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        q = query[:, :, start:stop]
        k = key[:, :, start:stop].repeat_interleave(groups, 1)
        v = value[:, :, start:stop].repeat_interleave(groups, 1)
        length = stop - start
        scores = (q @ k.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
        if causal:
            visible = visible.tril()
        if window is not None:
            visible = visible.triu(1 - window)
        scores = scores.masked_fill(~visible, float("-inf"))
        outputs.append(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)
