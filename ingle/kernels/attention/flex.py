"""Packed attention by torch's FlexAttention, for what FlashAttention does not compute.

That is softcaps, sinks, biases and float32.

The blocks of scores that any token sees follow from the boundaries of documents by arithmetic on the device: the keys
that a token sees are one span, so those of a block of tokens are one span of blocks. Nothing of size N x N is built,
and nothing waits for the device. Trees have a span in each level; a block is chosen if a token sees any of its keys.

Legend: N packed tokens, M packed keys, D documents, L levels, Q blocks of B tokens, K blocks of keys, Hq query heads,
Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ingle.kernels.attention.spans import Window, reach
from ingle.kernels.attention.trees import Trees

#: Tokens and keys of a block.
BLOCK = 128


def find_spans(
    cu_seqlens: Tensor, num_tokens: int, *, causal: bool, window: Window, cu_seqlens_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the first key that each token sees, and one past the last, int64 [N]."""
    bounds = cu_seqlens.long()
    index = torch.arange(num_tokens, device=bounds.device)
    document = torch.searchsorted(bounds[1:], index, right=True)
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.long()
    first, last = bounds_k[:-1][document], bounds_k[1:][document]
    if cu_seqlens_k is not None:
        return first, last
    before, after = reach(causal, window)
    first = first if before is None else torch.maximum(first, index - before)
    last = last if after is None else torch.minimum(last, index + after + 1)
    return first, last


def make_mask(
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    causal: bool,
    window: Window,
    cu_seqlens_k: Tensor | None = None,
    num_keys: int | None = None,
) -> BlockMask:
    """Returns which blocks of scores are computed, and a function that masks those that are only partly visible."""
    num_keys = num_tokens if num_keys is None else num_keys
    first_N, last_N = find_spans(cu_seqlens, num_tokens, causal=causal, window=window, cu_seqlens_k=cu_seqlens_k)
    start_Q = torch.arange(-(-num_tokens // BLOCK), device=first_N.device) * BLOCK
    end_Q = (start_Q + BLOCK).clamp(max=num_tokens) - 1
    # The first and the last key of a token never decrease from one token to the next.
    any_first_Q, any_last_Q = first_N[start_Q] // BLOCK, (last_N[end_Q] - 1) // BLOCK
    block_K = torch.arange(-(-num_keys // BLOCK), device=first_N.device)
    seen_QK = (block_K >= any_first_Q[:, None]) & (block_K <= any_last_Q[:, None])
    # A block is complete if the last token sees its first key and the first token its last key.
    ends_K = (block_K * BLOCK + BLOCK).clamp(max=num_keys)
    whole_QK = (first_N[end_Q][:, None] <= block_K * BLOCK) & (last_N[start_Q][:, None] >= ends_K) & seen_QK

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_N[query]) & (key < last_N[query])

    return _block_mask(seen_QK, whole_QK, is_visible, (num_tokens, num_keys))


def make_tree_mask(trees: Trees, device: torch.device, *, window: Window, chunk: int | None = None) -> BlockMask:
    """Returns the mask of causal trees; makes it once.

    The keys that a token sees are one span in each level, so those of a block of tokens need not follow each other.
    """
    before, _ = reach(True, window)
    key = ("mask", device, before, chunk)
    if key not in trees.made:
        first, last = (torch.from_numpy(each).to(device) for each in trees.find_spans(before, chunk))
        trees.made[key] = _tree_mask(first, last)
    found: BlockMask = trees.made[key]
    return found


def _tree_mask(first_LN: Tensor, last_LN: Tensor) -> BlockMask:
    num_tokens = first_LN.shape[1]
    num_blocks = -(-num_tokens // BLOCK)
    # Rows beyond the end repeat the last one.
    first_LQB, last_LQB = (
        torch.cat((each, each[:, -1:].expand(-1, num_blocks * BLOCK - num_tokens)), 1).unflatten(1, (num_blocks, BLOCK))
        for each in (first_LN, last_LN)
    )
    start_K = torch.arange(num_blocks, device=first_LN.device) * BLOCK
    end_K = (start_K + BLOCK).clamp(max=num_tokens)
    seen_QK = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=first_LN.device)
    whole_QK = seen_QK.clone()
    for first_QB1, last_QB1 in zip(first_LQB[..., None], last_LQB[..., None], strict=True):
        seen_QK |= ((last_QB1 > first_QB1) & (first_QB1 < end_K) & (last_QB1 > start_K)).any(1)
        whole_QK |= ((first_QB1 <= start_K) & (last_QB1 >= end_K)).all(1)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key >= first_LN[0][query]) & (key < last_LN[0][query])
        for level in range(1, len(first_LN)):
            seen = seen | ((key >= first_LN[level][query]) & (key < last_LN[level][query]))
        return seen

    return _block_mask(seen_QK, whole_QK, is_visible, (num_tokens, num_tokens))


def _block_mask(
    seen_QK: Tensor, whole_QK: Tensor, visible: Callable[..., Tensor], lengths: tuple[int, int]
) -> BlockMask:
    partial, whole = _list_blocks(seen_QK & ~whole_QK), _list_blocks(whole_QK)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    causal: bool,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    returns_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Like ``ingle.kernels.attention.packed.packed_attention``, for v with heads of the size of q's. Not measured.

    A sink is one more key with a constant score and no value, so it scales the output by
    ``exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink)``.
    """
    change = _cap(softcap) if softcap is not None else _add(bias) if bias is not None else None
    keys: dict[str, Any] = {"cu_seqlens_k": cu_seqlens_k, "num_keys": k.shape[2]}
    mask = make_mask(cu_seqlens, q.shape[2], causal=causal, window=window, **keys)
    return _run(q, k, v, mask, change, scale, sinks, returns_lse)


def attend_trees(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trees: Trees,
    *,
    scale: float,
    window: Window,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    returns_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Like ``ingle.kernels.attention.tree_attention.tree_attention``, for v with heads of the size of q's.

    Not measured. A block of keys adds the gradients of its queries in one program and in order, without atomics.
    """
    mask = make_tree_mask(trees, q.device, window=window, chunk=chunk)
    return _run(q, k, v, mask, None if softcap is None else _cap(softcap), scale, sinks, returns_lse)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    change: Callable[..., Tensor] | None,
    scale: float,
    sinks: Tensor | None,
    returns_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    run: Any = _compiled() if q.is_cuda else flex_attention
    options: dict[str, Any] = {"score_mod": change, "block_mask": mask, "scale": scale}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if sinks is None and not returns_lse:
        out: Tensor = run(q, k, v, **options)
        return out.transpose(1, 2)
    out, auxiliary = run(q, k, v, **options, return_aux=AuxRequest(lse=True))
    lse: Tensor = auxiliary.lse
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1).to(out.dtype)
        lse = torch.logaddexp(lse, sinks.float()[:, None])
    return (out.transpose(1, 2), lse[0].t()) if returns_lse else out.transpose(1, 2)


def fits(q: Tensor) -> bool:
    """Returns whether FlexAttention takes heads of this size and dtype."""
    size = q.shape[3]
    return size >= 16 and size & (size - 1) == 0 and q.dtype in (torch.bfloat16, torch.float16, torch.float32)


@cache
def _compiled() -> Callable[..., Any]:
    """Returns FlexAttention as one kernel; without compilation it stores all scores."""
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _add(bias: Tensor) -> Callable[..., Tensor]:
    last = bias.shape[1] - 1

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, (key - query + last // 2).clamp(0, last)]

    return add


def _list_blocks(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of chosen blocks of each row, and their indices before all others, as BlockMask expects."""
    order_QK = torch.argsort(chosen_QK.int(), dim=1, descending=True, stable=True)
    return chosen_QK.sum(1, dtype=torch.int32)[None, None], order_QK.int()[None, None]
