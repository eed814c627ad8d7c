"""Attention of single tokens over keys and values that are kept, for generation.

A token reads the keys of its prompt, which its whole group shares, and then those of its own answer. Every sum runs
over them in this order and is computed by one thread, so it depends on nothing but the token's own text.

Legend: M tokens of a pass, T tokens of the store, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head size, Dv
size of a value, L keys of the longest text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from torch import Tensor

from ingle.kernels.attention.cpu import Scores
from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import FAST, as_array, bits, exp, largest, load, store, supported
from ingle.kernels.threads import match_threads

Prepared = TypeVar("Prepared")

_NO_SINKS = np.empty(0, np.float32)
#: Keys are stored in blocks of this many rows, transposed: a product with a query then needs no sum across a vector.
BLOCK = 64
#: Largest size of what layers prepare for the passes over one store.
PREPARED_BYTES = 1 << 28
#: Columns of :attr:`Places.texts`.
_START, _LENGTH, _OWN_START, _POSITION = range(4)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pass are stored, and where the texts are that they continue.

    Attributes:
        rows: The row of the store that gets each token's own key and value, int64 [M]. Rows of tokens that nobody needs
            may be equal.
        texts: int64 [M, 4]: where the prompt begins in the store, how many tokens it has there, where the rest of the
            text begins, and the token's position in the text.
    """

    rows: Tensor
    texts: npt.NDArray[np.int64]
    _found: dict[tuple[int | None, int | None], npt.NDArray[np.int64]] = field(default_factory=dict)

    def first(self, before: int | None, chunk: int | None) -> npt.NDArray[np.int64]:
        """Returns the first position that each token sees, int64 [M]; finds it once.

        Args:
            before: How many tokens before itself a token sees; None for all.
            chunk: A token sees only its own chunk of this many positions.
        """
        if (before, chunk) not in self._found:
            positions_M = self.texts[:, _POSITION]
            first_M = np.zeros_like(positions_M) if before is None else np.maximum(positions_M - before, 0)
            if chunk is not None:
                first_M = np.maximum(first_M, positions_M // chunk * chunk)
            self._found[before, chunk] = first_M
        return self._found[before, chunk]


class KeyStore:
    """The keys and values of all layers.

    Args:
        num_rows: T.

    Attributes:
        places: Tokens of the pass that is computed.
    """

    places: Places

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._prepared: dict[Any, Any] = {}
        self._room = PREPARED_BYTES
        self._next = 0

    def begin(self, places: Places) -> None:
        """Begins a pass; each of its attention layers then calls :meth:`attend` once, in the same order."""
        assert self._next == len(self._layers), "a pass before this one had another number of attention layers"
        self.places, self._next = places, 0

    def attend(
        self,
        q_MHD: Tensor,
        k_MHD: Tensor,
        v_MHD: Tensor,
        scores: Scores,
        *,
        before: int | None = None,
        chunk: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Keeps the keys and values of the pass, and computes its attention.

        Args:
            q_MHD: Queries, [M, Hq, Dh].
            k_MHD: Keys, [M, Hkv, Dh].
            v_MHD: Values, [M, Hkv, Dv].
            scores: What is done with the scores; without a bias.
            before: How many tokens before itself a token sees; None for all.
            chunk: A token sees only its own chunk of this many positions.
            sinks: Scores of one more key without a value, [Hq].

        Returns:
            [M, Hq, Dv].
        """
        keys, values_THD = self.next_layer(k_MHD, v_MHD)
        rows = self.places.rows.to(v_MHD.device)
        keys[rows // BLOCK, :, :, rows % BLOCK] = k_MHD
        values_THD.index_copy_(0, rows, v_MHD)
        return self.attend_placed(q_MHD, keys, values_THD, scores, before=before, chunk=chunk, sinks=sinks)

    def next_layer(self, k_MHD: Tensor, v_MHD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the stored keys and values of the next attention layer, [T / 64, Hkv, Dh, 64] and [T, Hkv, Dv].

        Args:
            k_MHD: Keys, or anything of their type and shape but for M; likewise ``v_MHD``.
            v_MHD: Values.
        """
        if self._next == len(self._layers):
            keys = k_MHD.new_zeros(-(-self._num_rows // BLOCK), *k_MHD.shape[1:], BLOCK)
            self._layers.append((keys, v_MHD.new_zeros(self._num_rows, *v_MHD.shape[1:])))
        self._next += 1
        return self._layers[self._next - 1]

    def attend_placed(
        self,
        q_MHD: Tensor,
        keys: Tensor,
        values_THD: Tensor,
        scores: Scores,
        *,
        before: int | None = None,
        chunk: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Computes :meth:`attend` where the keys and values of the pass are in their rows already."""
        first_M = self.places.first(before, chunk)
        return cached_attention(q_MHD, keys, values_THD, self.places.texts, first_M, scores, sinks)

    def prepare(self, layer: Any, num_bytes: int, make: Callable[[], Prepared | None]) -> Prepared | None:
        """Returns what a layer has prepared for all passes over this store; None if there is no room for it.

        Args:
            layer: The layer.
            num_bytes: What it takes.
            make: Makes it, in the first pass, or returns None.
        """
        if layer not in self._prepared:
            made = make() if num_bytes <= self._room else None
            self._room -= 0 if made is None else num_bytes
            self._prepared[layer] = made
        found: Prepared | None = self._prepared[layer]
        return found


def keep_in(mask: Tensor, keys: KeyStore) -> Tensor:
    """Makes the attention layers that get a mask use a store."""
    stored: Any = mask
    stored.key_store = keys
    return mask


def store_of(mask: Any) -> KeyStore | None:
    """Returns the store that the layers with this mask use; None if they use none."""
    found: KeyStore | None = getattr(mask, "key_store", None)
    return found


def cached_attention(
    q_MHD: Tensor,
    keys: Tensor,
    values_THD: Tensor,
    texts_M4: npt.NDArray[np.int64],
    first_M: npt.NDArray[np.int64],
    scores: Scores,
    sinks: Tensor | None = None,
) -> Tensor:
    """Returns the attention of tokens over stored keys, [M, Hq, Dv].

    Args:
        q_MHD: Queries.
        keys: Stored keys, those of the tokens themselves included, [T / 64, Hkv, Dh, 64].
        values_THD: Stored values.
        texts_M4: See :attr:`Places.texts`.
        first_M: The first position that each token sees.
        scores: What is done with the scores; without a bias.
        sinks: Scores of one more key without a value, [Hq].
    """
    if not supported(q_MHD, keys, values_THD):
        return _attend(q_MHD, keys, values_THD, texts_M4, first_M, scores, sinks)
    out_MHD = q_MHD.new_empty(*q_MHD.shape[:2], values_THD.shape[2])
    match_threads(int((texts_M4[:, _POSITION] - first_M + 1).sum()) * q_MHD.shape[1] * q_MHD.shape[2])
    attend_rows(
        bits(q_MHD.contiguous()),
        bits(keys),
        bits(values_THD),
        texts_M4,
        first_M,
        np.float32(scores.scale),
        np.float32(scores.softcap),
        _NO_SINKS if sinks is None else as_array(sinks.detach().float().contiguous()),
        bits(out_MHD),
    )
    return out_MHD


def _attend(
    q_MHD: Tensor,
    keys: Tensor,
    values_THD: Tensor,
    texts_M4: npt.NDArray[np.int64],
    first_M: npt.NDArray[np.int64],
    scores: Scores,
    sinks: Tensor | None,
) -> Tensor:
    """Reference of :func:`cached_attention` on any device."""
    texts, first = (torch.from_numpy(each).to(q_MHD.device) for each in (texts_M4, first_M))
    start_M1, length_M1, own_M1, position_M1 = texts[:, :, None].unbind(1)
    positions_L = torch.arange(int(texts_M4[:, _POSITION].max()) + 1, device=q_MHD.device)
    index_ML = torch.where(positions_L < length_M1, start_M1 + positions_L, own_M1 + positions_L - length_M1)
    visible_ML = (positions_L >= first[:, None]) & (positions_L <= position_M1)
    index_ML = torch.where(visible_ML, index_ML, 0)
    keys_THD = keys.permute(0, 3, 1, 2).flatten(0, 1)
    group = q_MHD.shape[1] // keys_THD.shape[1]
    keys_MLHD, values_MLHD = (each[index_ML].repeat_interleave(group, 2) for each in (keys_THD, values_THD))
    wide = torch.promote_types(q_MHD.dtype, torch.float32)
    scores_MHL = torch.einsum("mhd,mlhd->mhl", q_MHD.to(wide), keys_MLHD.to(wide)) * scores.scale
    if scores.softcap:
        scores_MHL = torch.tanh(scores_MHL / scores.softcap) * scores.softcap
    scores_MHL = scores_MHL.masked_fill(~visible_ML[:, None], -torch.inf)
    if sinks is not None:
        sinks_MH1 = sinks.to(wide)[None, :, None].expand(len(scores_MHL), -1, 1)
        scores_MHL = torch.cat((scores_MHL, sinks_MH1), -1)
    weights_MHL = scores_MHL.softmax(-1)[..., : len(positions_L)].to(q_MHD.dtype)
    return torch.einsum("mhl,mlhd->mhd", weights_MHL.to(wide), values_MLHD.to(wide)).to(q_MHD.dtype)


@compile_float_kernel
def attend_rows(q, keys, values, texts, first, scale, softcap, sinks, out):  # type: ignore[no-untyped-def]
    """Computes each token and head of keys by one thread."""
    num_tokens, num_heads, _ = q.shape
    num_groups = keys.shape[1]
    group = num_heads // num_groups
    for index in prange(num_tokens * num_groups):
        token, head = index // num_groups, index % num_groups
        text = texts[token]
        # Rows of the store: those of the prompt, and the token's own.
        begin = text[_START] + min(first[token], text[_LENGTH])
        end = text[_START] + min(text[_POSITION] + 1, text[_LENGTH])
        own_begin = text[_OWN_START] + max(0, first[token] - text[_LENGTH])
        own_end = text[_OWN_START] + max(0, text[_POSITION] + 1 - text[_LENGTH])
        count = end - begin
        row = np.empty(count + own_end - own_begin, np.float32)
        scratch = np.empty(BLOCK, np.float32)
        weights = np.empty(len(row), values.dtype)
        total = np.empty(values.shape[2], np.float32)
        for member in range(head * group, (head + 1) * group):
            _score(q[token, member], keys, head, begin, scratch, row[:count])
            _score(q[token, member], keys, head, own_begin, scratch, row[count:])
            sink = sinks[member] if len(sinks) > 0 else np.float32(-np.inf)
            _weigh(row, scale, softcap, sink, weights)
            total[:] = np.float32(0.0)
            _add(weights[:count], values, head, begin, total)
            _add(weights[count:], values, head, own_begin, total)
            result = out[token, member]
            for j in range(len(total)):
                store(result, j, total[j])


@njit(fastmath=FAST, error_model="numpy")
def _score(query, keys, head, begin, scratch, row):  # type: ignore[no-untyped-def]
    """Computes the products of a query with the keys of some rows."""
    done = 0
    while done < len(row):
        block, lane = (begin + done) // BLOCK, (begin + done) % BLOCK
        count = min(BLOCK - lane, len(row) - done)
        _multiply(query, keys[block, head], scratch)
        row[done : done + count] = scratch[lane : lane + count]
        done += count


@njit(fastmath=FAST, error_model="numpy")
def _multiply(query, block, products):  # type: ignore[no-untyped-def]
    """Multiplies a query with all keys of a block, in loops of constant length: so no bit depends on a key's place."""
    size = len(query) // 4 * 4
    products[:] = np.float32(0.0)
    for j in range(0, size, 4):
        a, b, c, d = load(query, j), load(query, j + 1), load(query, j + 2), load(query, j + 3)
        first, second, third, fourth = block[j], block[j + 1], block[j + 2], block[j + 3]
        for s in range(BLOCK):
            products[s] += a * load(first, s) + b * load(second, s) + c * load(third, s) + d * load(fourth, s)
    for j in range(size, len(query)):
        a, first = load(query, j), block[j]
        for s in range(BLOCK):
            products[s] += a * load(first, s)


@njit(fastmath=FAST, error_model="numpy")
def _weigh(row, scale, softcap, sink, weights):  # type: ignore[no-untyped-def]
    """Computes the softmax, rounded like the weights of the training kernel."""
    for s in range(len(row)):
        row[s] *= scale
    if softcap > np.float32(0.0):
        for s in range(len(row)):
            tanh = np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * row[s] / softcap) + np.float32(1.0))
            row[s] = softcap * tanh
    top = max(largest(row), sink)
    total = np.float32(0.0)
    for s in range(len(row)):
        weight = exp(row[s] - top)
        row[s] = weight
        total += weight
    if sink > np.float32(-np.inf):
        total += exp(sink - top)
    inverse = np.float32(1.0) / total
    for s in range(len(row)):
        store(weights, s, row[s] * inverse)


@njit(fastmath=FAST, error_model="numpy")
def _add(weights, values, head, begin, total):  # type: ignore[no-untyped-def]
    """Adds the weighted values of some rows, four at a time."""
    whole = len(weights) // 4 * 4
    for s in range(0, whole, 4):
        a, b, c, d = load(weights, s), load(weights, s + 1), load(weights, s + 2), load(weights, s + 3)
        first, second = values[begin + s, head], values[begin + s + 1, head]
        third, fourth = values[begin + s + 2, head], values[begin + s + 3, head]
        for j in range(len(total)):
            total[j] += a * load(first, j) + b * load(second, j) + c * load(third, j) + d * load(fourth, j)
    for s in range(whole, len(weights)):
        a, first = load(weights, s), values[begin + s, head]
        for j in range(len(total)):
            total[j] += a * load(first, j)
