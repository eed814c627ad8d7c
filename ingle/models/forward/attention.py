"""Attention over packed documents, registered with transformers under the name :data:`IMPLEMENTATION`.

``forward_hidden`` passes the document boundaries as keyword arguments with transformers' names, and every attention
layer that uses transformers' registry calls :func:`attend`. Without boundaries (in generation), the usual mask applies.

Legend: B rows, Hq query heads, Hkv key/value heads, T queries, S keys, Dh head size, N packed tokens, D documents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ingle.errors import ModelError
from ingle.kernels.attention.bounds import has_trees, is_bounds, read_bounds
from ingle.kernels.attention.cached import KeyStore, store_of
from ingle.kernels.attention.cpu import Scores
from ingle.kernels.attention.packed import packed_attention
from ingle.kernels.attention.prefix import add_keys
from ingle.kernels.attention.spans import Window, reach
from ingle.kernels.attention.tree_attention import cut_bounds, tree_attention
from ingle.models.forward.bounds import describe

#: The name in transformers' registry of attention functions.
IMPLEMENTATION = "ingle_packed"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention within each document, or according to the mask if there are no boundaries.

    The architecture's own attention dropout is not applied: adapters have their own.

    Args:
        module: The attention layer.
        query: ``[B, Hq, T, Dh]``.
        key: ``[B, Hkv, S, Dh]``.
        value: ``[B, Hkv, S, Dh]``.
        attention_mask: ``[B, 1, T, S]`` boolean (true = attend) in generation.
        scaling: Factor before the softmax; ``Dh ** -0.5`` if None.
        dropout: Ignored.
        sliding_window: Tokens of its own document that a query sees, including itself.
        softcap: ``softcap * tanh(score / softcap)`` before the mask.
        is_causal: Whether a query sees only earlier tokens; the layer's own setting if None.
        cu_seq_lens_q: First token of each document and the end, ``[D + 1]``.
        max_length_q: Length of the longest document, if it is known.
        s_aux: Attention sinks ``[Hq]``: the score of one more key, which has no value.
        position_bias: Added to the scores: ``[1 or B, Hq, T, S]``; over packed documents ``[1, Hq, 2L - 1]`` by
            distance, or empty for none.
        kwargs: Other arguments that transformers passes to every attention function.

    Returns:
        ``[B, T, Hq, Dh]`` and no attention weights.

    Raises:
        ModelError: The architecture needs something that is not supported.
    """
    added = _added_keys(module, key, value, kwargs.get("position_ids"))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    options: dict[str, Any]
    bounds = None
    if (store := store_of(attention_mask)) is not None:
        assert attention_mask is not None and position_bias is None, "layouts with biases by distance use no store"
        settings = sliding_window, causal
        return _attend_stored(
            module, query, key, value, attention_mask, store, settings, Scores(scale, softcap or 0.0), s_aux
        ), None
    if has_trees(attention_mask):
        options = {"scale": scale, "softcap": softcap, "sinks": s_aux, "chunk": _chunk(module)}
        options["returns_lse"] = added is not None
        if position_bias is not None and position_bias.numel() > 0:
            options["bias"] = _by_distance(module, position_bias)
        settings = sliding_window, causal
        result = _attend_trees(module, query, key, value, attention_mask, settings, options)
        if added is None:
            return result, None
        before = _reach_of(module, attention_mask, sliding_window)
        return _with_added(result, added, query, before, options), None
    if cu_seq_lens_q is None and attention_mask is not None and is_bounds(attention_mask):
        bounds = read_bounds(attention_mask)
        cu_seq_lens_q, max_length_q = bounds.queries, bounds.longest
    if cu_seq_lens_q is not None:
        options = {"scale": scale, "softcap": softcap, "sinks": s_aux}
        if position_bias is not None and position_bias.numel() > 0:
            options["bias"] = _by_distance(module, position_bias)
        if bounds is not None and bounds.crosses:
            options |= {"cu_seqlens_k": bounds.keys, "longest_k": bounds.longest_keys}
            return packed_attention(query, key, value, cu_seq_lens_q, **options, longest=max_length_q), None
        if bounds is not None and bounds.described:
            options |= {"causal": bounds.after == 0, "window": (bounds.before, bounds.after)}
        else:
            options |= {"causal": causal, "window": _window(module, sliding_window)}
        cu_seq_lens_q = _cut(module, cu_seq_lens_q, max_length_q)
        options |= {"longest": max_length_q, "returns_lse": added is not None}
        result = packed_attention(query, key, value, cu_seq_lens_q, **options)
        if added is None:
            return result, None
        before = _reach_of(module, attention_mask, sliding_window)
        return _with_added(result, added, query, before, options), None
    if added is not None:
        before = _reach_of(module, None, sliding_window)
        key, value, attention_mask = _put_before(added, query, key, value, attention_mask, before)
    return _attend_masked(query, key, value, attention_mask, scale, causal, softcap, s_aux, position_bias), None


class _Added(NamedTuple):
    """Keys and values that an adapter added to a layer.

    Attributes:
        keys: ``[Hkv, P, Dh]``.
        values: ``[Hkv, P, Dh]``.
        positions: Position of each query, ``[1 or B, T]``; None if the architecture does not pass it on.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None

    def hidden(self, before: int | None) -> Tensor | None:
        """Returns which keys a query does not see if it sees so many earlier tokens, ``[1 or B, T, P]``."""
        if before is None:
            return None
        if self.positions is None:
            raise ModelError(
                "Layers with a sliding window do not say where their tokens are, so they cannot have added keys.",
                where="adapter.kind = prefix",
                fix="--adapter.kind=prompt",
            )
        return self.positions[..., None] - torch.arange(self.keys.shape[1], device=self.keys.device) > before


def _added_keys(module: nn.Module, key: Tensor, value: Tensor, positions: Tensor | None) -> _Added | None:
    """Returns the keys and values that an adapter added to a layer; None if it added none, or is off.

    Raises:
        ModelError: They do not fit the layer.
    """
    virtual: Any = module._modules.get("virtual_keys")
    if virtual is None or not virtual.is_on:
        return None
    keys, values = (each.to(key.dtype) for each in virtual())
    sizes = (key.shape[1], key.shape[3], value.shape[1], value.shape[3])
    wanted = (keys.shape[0], keys.shape[2], values.shape[0], values.shape[2])
    if sizes != wanted or _chunk(module) is not None:
        why = f"it has {sizes[0]} heads of {sizes[1]} and {sizes[3]}; the keys have {wanted[0]} heads of {wanted[1]}"
        raise ModelError(
            f"The attention of {type(module).__name__} cannot have added keys.",
            where="adapter.kind = prefix",
            why=why if sizes != wanted else "it sees texts in chunks",
            fix="--adapter.kind=prompt",
        )
    return _Added(keys, values, positions)


def _reach_of(module: nn.Module, mask: Tensor | None, passed: int | None) -> int | None:
    """Returns how many earlier tokens a token sees; None for all."""
    if mask is not None and is_bounds(mask) and (bounds := read_bounds(mask)).described:
        return bounds.before
    window = _window(module, passed)
    return None if window is None else window - 1


def _with_added(
    result: tuple[Tensor, Tensor], added: _Added, query: Tensor, before: int | None, options: dict[str, Any]
) -> Tensor:
    """Returns attention over added keys, too, from its result over all others and the log-sum-exp of their scores."""
    hidden = added.hidden(before)
    shared = {"scale": options["scale"], "softcap": options["softcap"]}
    return add_keys(*result, query, added.keys, added.values, **shared, hidden=None if hidden is None else hidden[0])


def _put_before(
    added: _Added, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, before: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Puts added keys and values before those of the rows."""
    rows, num_queries, num_keys = len(query), query.shape[2], key.shape[2]
    hidden = added.hidden(before)
    if mask is None and (num_queries > 1 or hidden is not None):  # one more token sees all that a cache has
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=key.device)
        mask = mask.tril(num_keys - num_queries)
    if mask is not None:
        seen = mask.new_ones(1, 1, 1, 1) if hidden is None else ~hidden[:, None]
        num_added = added.keys.shape[1]
        shape = (max(len(mask), len(seen)), 1, num_queries)
        mask = torch.cat((seen.expand(*shape, num_added), mask.expand(*shape, num_keys)), -1)
    key, value = (
        torch.cat((more.expand(rows, *more.shape), own), 2) for more, own in ((added.keys, key), (added.values, value))
    )
    return key, value, mask


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled again for each set of trees
def _attend_trees(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    settings: tuple[int | None, bool],
    options: dict[str, Any],
) -> Any:
    bounds = read_bounds(mask)
    sliding_window, causal = settings
    assert bounds.trees is not None
    assert bounds.after == 0 if bounds.described else causal, "only what is predicted from left to right has trees"
    window: Window = (bounds.before, 0) if bounds.described else _window(module, sliding_window)
    return tree_attention(query, key, value, bounds.trees, window=window, **options)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer cannot contain numba's kernels
def _attend_stored(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    store: KeyStore,
    settings: tuple[int | None, bool],
    scores: Scores,
    sinks: Tensor | None,
) -> Tensor:
    """Computes attention of single tokens over the keys of a store, which gets theirs; ``[1, T, Hq, Dh]``."""
    bounds = read_bounds(mask)
    sliding_window, causal = settings
    assert bounds.after == 0 if bounds.described else causal, "only texts that grow from left to right have a store"
    before = bounds.before if bounds.described else reach(True, _window(module, sliding_window))[0]
    q_THD, k_THD, v_THD = (part[0].transpose(0, 1) for part in (query, key, value))
    return store.attend(q_THD, k_THD, v_THD, scores, before=before, chunk=_chunk(module), sinks=sinks)[None]


def _by_distance(module: nn.Module, position_bias: Tensor) -> Tensor:
    """Returns a bias by distance, ``[Hq, 2L - 1]``.

    Raises:
        ModelError: The architecture computes its bias in another way.
    """
    if position_bias.dim() != 3:
        raise ModelError(
            f"{type(module).__name__} uses a position bias that packed attention does not compute.",
            where="model.id",
            fix="choose a model of another architecture",
        )
    return position_bias[0]


def _window(module: nn.Module, passed: int | None) -> int | None:
    """Returns the window that a layer passes, or the config's if the layer leaves the window to the mask.

    Raises:
        ModelError: The config has a window but does not say for which layers.
    """
    config = getattr(module, "config", None)
    window: int | None = getattr(config, "sliding_window", None)
    if passed is not None or not window:
        return passed
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[module.layer_idx] == "sliding_attention" else None
    if window < getattr(config, "max_position_embeddings", 0):
        raise ModelError(
            f"{type(module).__name__} has a sliding window of {window:,} tokens but does not say which layers use it.",
            where="model.id",
            fix="choose a model of another architecture",
        )
    return None


def _cut(module: nn.Module, cu_seqlens: Tensor, longest: int | None) -> Tensor:
    """Returns the boundaries of what attention sees together: documents, or their chunks in a chunked layer."""
    size = _chunk(module)
    if size is None or (longest is not None and longest <= size):
        return cu_seqlens
    if longest is None:
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return cut_bounds(cu_seqlens, size, longest)


def _chunk(module: nn.Module) -> int | None:
    """Returns the size of the chunks within which a chunked layer sees tokens; None for any other layer."""
    config = getattr(module, "config", None)
    kinds, size = getattr(config, "layer_types", None), getattr(config, "attention_chunk_size", None)
    return size if kinds and size and kinds[module.layer_idx] == "chunked_attention" else None


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    causal = causal and mask is None and query.shape[2] > 1
    if bias is not None:  # no architecture has one together with sinks or a softcap
        if causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        mask, causal = mask.to(query.dtype), False
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=groups > 1
        )
        return out.transpose(1, 2).contiguous()
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[-2]]
    return (weights @ value).transpose(1, 2).contiguous()


# transformers' public interface; runs once, on import.
AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, describe)
