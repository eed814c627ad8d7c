"""BART's corruption: sentences are permuted, and spans of words are replaced by one mask each.

Legend: L tokens of a text, W words of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.config.objective import Span
from ingle.data.backend import copy_backend
from ingle.data.corruption.samples import Target
from ingle.data.corruption.words import WordTable, mask_token
from ingle.data.counters import Counters, Integers, Place, Purpose
from ingle.data.special_tokens import read_special_tokens
from ingle.data.types import Ids, Mask, Sample, Tokenizer

_Tokens = npt.NDArray[Any]


class Infilling:
    """Hides spans of a text whose sentences it permutes; the target is the whole text.

    Source: Lewis et al. 2020, "BART" (arXiv 1910.13461), section 2.2.

    Args:
        config: The rates.
        tokenizer: Has the mask token.
        target: How the decoder reads its target.
        seed: Seed of the run.
        vocab_size: Tokens that a random token is drawn from.

    Raises:
        ConfigError: The tokenizer has no mask token.
    """

    def __init__(self, config: Span, tokenizer: Tokenizer, target: Target, *, seed: int, vocab_size: int) -> None:
        self._config, self._target, self._seed, self._vocab_size = config, target, seed, vocab_size
        self._mask = mask_token(tokenizer)
        self._words = WordTable(tokenizer)
        self._prefix, self._suffix = read_special_tokens(tokenizer, copy_backend(tokenizer), 1).parts

    def __call__(self, samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
        """Returns sources, and targets in the columns of the decoder."""
        return [self._corrupt(sample.input_ids, place) for sample, place in zip(samples, places, strict=True)]

    def _corrupt(self, ids: Ids, place: Place) -> Sample:
        draw = Counters(self._seed, place)
        text = ids[sentence_order(self._words.sentence_ends(ids), draw)] if self._config.permute_sentences else ids
        source = infill(
            text,
            self._words.word_starts(text),
            draw,
            mask=self._mask,
            rate=self._config.rate,
            poisson=self._config.poisson,
            random=self._config.random,
            vocab_size=self._vocab_size,
        )
        return self._target.sample(self._surround(source), self._surround(ids))

    def _surround(self, ids: _Tokens) -> _Tokens:
        return np.concatenate([self._prefix, ids, self._suffix])


def sentence_order(ends: Mask, draw: Counters) -> Integers:
    """Returns the tokens of a text, sentence by sentence in random order.

    Args:
        ends: The last tokens of sentences, bool [L]; the last token of the text is one.
        draw: The random numbers of the document.
    """
    sentences = np.split(np.arange(len(ends)), np.flatnonzero(ends)[:-1] + 1)
    return np.concatenate([sentences[k] for k in draw.permutation(Purpose.PERMUTE, len(sentences))])


def infill(
    ids: _Tokens,
    starts: Mask,
    draw: Counters,
    *,
    mask: int,
    rate: float,
    poisson: float,
    random: float,
    vocab_size: int,
) -> _Tokens:
    """Replaces spans of words by one mask each.

    The lengths of the spans add up to ``ceil(rate * W)``; a span of length 0 inserts a mask. As in fairseq, spans begin
    at different words but may overlap, and end with the text, so that fewer words than that may be removed. A span that
    begins inside another one leaves no mask of its own.

    Source: facebookresearch/fairseq, ``DenoisingDataset.add_whole_word_mask``, which computes the number of words in
    float32 and so sometimes hides one more.

    Args:
        ids: The text, [L].
        starts: The tokens that begin words, bool [L]; the first token does.
        draw: The random numbers of the document.
        mask: The mask token.
        rate: Share of the words to hide.
        poisson: Mean length of a span.
        random: Share of the masks that become a random token.
        vocab_size: Tokens that a random token is drawn from.
    """
    words = np.flatnonzero(starts)
    lengths = span_lengths(math.ceil(len(words) * rate), poisson, draw)
    num_inserted, lengths = int((lengths == 0).sum()), lengths[lengths > 0]
    begins = draw.permutation(Purpose.STARTS, len(words))[: len(lengths)]
    inside = _inside_spans(begins, lengths, len(words))
    hidden = inside.copy()
    hidden[begins] = True
    is_mask = np.zeros(len(ids), bool)
    is_mask[words[begins[~inside[begins]]]] = True
    become_random = draw.uniform(Purpose.RANDOM, len(ids)) < random
    masks = np.where(become_random, draw.below(Purpose.TOKEN, len(ids), vocab_size), mask)
    kept = is_mask | ~hidden[np.cumsum(starts) - 1]
    return _insert_masks(np.where(is_mask, masks, ids)[kept], num_inserted, draw, mask, random, vocab_size)


def span_lengths(total: int, poisson: float, draw: Counters) -> Integers:
    """Returns Poisson numbers that add up to ``total``; the last one is cut."""
    lengths = np.zeros(0, np.int64)
    while lengths.sum() < total:
        drawn = draw.uniform(Purpose.LENGTHS, total, first=len(lengths))
        lengths = np.concatenate([lengths, np.searchsorted(_poisson_distribution(poisson), drawn, side="right")])
    last = int(np.searchsorted(np.cumsum(lengths), total))
    lengths = lengths[: last + 1]
    lengths[last:] -= lengths.sum() - total
    return lengths


def _poisson_distribution(mean: float) -> npt.NDArray[np.float64]:
    """Returns ``P(X <= k)`` for k = 0, 1, ... until it is 1 but for 1e-12."""
    numbers = np.arange(int(mean + 12 * math.sqrt(mean)) + 20)
    logs = numbers * math.log(mean) - mean - np.cumsum(np.log(np.maximum(numbers, 1)))
    return np.cumsum(np.exp(logs))


def _inside_spans(begins: Integers, lengths: Integers, num_words: int) -> Mask:
    """Returns which words lie in a span behind its first word, bool [W]."""
    change = np.zeros(num_words + 1, np.int64)
    np.add.at(change, begins + 1, 1)
    np.add.at(change, np.minimum(begins + lengths, num_words), -1)
    inside: Mask = np.cumsum(change)[:-1] > 0
    return inside


def _insert_masks(ids: _Tokens, inserted: int, draw: Counters, mask: int, random: float, vocab_size: int) -> _Tokens:
    """Inserts masks at random places, of which a share become random tokens."""
    if not inserted:
        return ids
    places = draw.choose(Purpose.INSERT, len(ids) + inserted, inserted)
    become_random = draw.permutation(Purpose.INSERT_RANDOM, inserted)[: math.ceil(inserted * random)]
    masks = np.full(inserted, mask, np.int64)
    masks[become_random] = draw.below(Purpose.INSERT_TOKEN, len(become_random), vocab_size)
    result = np.empty(len(ids) + inserted, np.int64)
    is_inserted = np.zeros(len(result), bool)
    is_inserted[places] = True
    result[is_inserted], result[~is_inserted] = masks, ids
    return result
