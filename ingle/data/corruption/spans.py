"""Span corruption of T5, and UL2's mixture of it.

A text of L tokens loses ``n`` tokens in ``s`` spans; both numbers depend on L alone. The source has a sentinel in place
of each span, the target a sentinel in place of each part that was kept; both end with the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.config.objective import Span
from ingle.data.corruption.samples import Target
from ingle.data.counters import Counters, Integers, Place, Purpose
from ingle.data.types import Ids, Mask, Sample, Tokenizer
from ingle.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Denoiser:
    """How a text is corrupted.

    Attributes:
        density: Share of the tokens that are removed.
        mean_length: Mean length of a span; None if the end of the text is the only span.
        mode: Name of its mode token.
    """

    density: float
    mean_length: float | None
    mode: str = ""

    def counts(self, length: int) -> tuple[int, int]:
        """Returns the number of removed tokens and of spans in a text of ``length`` tokens.

        Halves round to even, in float32 as in t5. t5 does not bound the spans by the tokens that are kept.
        """
        if length < 2:
            return 0, 0
        noise = int(np.round(np.float32(length) * np.float32(self.density)))
        noise = min(max(noise, 1), length - 1)
        if self.mean_length is None:
            return noise, 1
        spans = int(np.round(np.float32(noise) / np.float32(self.mean_length)))
        return noise, min(max(spans, 1), noise, length - noise)

    def mask(self, length: int, draw: Counters) -> Mask:
        """Returns which tokens are removed, bool [length]. All masks with these counts are equally likely.

        The first token is always kept and the last one removed.

        Source: google-research/t5, ``random_spans_noise_mask``.
        """
        noise, spans = self.counts(length)
        if not spans:
            return np.zeros(length, bool)
        removed = _compose(noise, spans, draw, Purpose.NOISE)
        kept = _compose(length - noise, spans, draw, Purpose.KEEP)
        return np.repeat(np.tile([False, True], spans), np.stack([kept, removed], 1).ravel())


#: UL2's mixture; each denoiser is equally likely.
#: Source: Tay et al. 2022, "UL2" (arXiv 2205.05131), section 3.1 and table 1.
UL2 = (
    Denoiser(0.15, 3, "R"),
    Denoiser(0.15, 8, "R"),
    Denoiser(0.5, 3, "X"),
    Denoiser(0.5, 8, "X"),
    Denoiser(0.15, 64, "X"),
    Denoiser(0.5, 64, "X"),
    Denoiser(0.25, None, "S"),
)


class SpanCorruption:
    """Removes spans from texts.

    Args:
        config: The style: ``t5`` or ``ul2``.
        tokenizer: Has the sentinels, the end-of-text token and the mode tokens.
        target: How the decoder reads its target.
        seed: Seed of the run.
        max_length: Tokens of the longest text.

    Raises:
        ConfigError: The tokenizer lacks a token, or has too few sentinels for the longest text.
    """

    def __init__(self, config: Span, tokenizer: Tokenizer, target: Target, *, seed: int, max_length: int) -> None:
        self._denoisers = denoisers(config)
        self._target, self._seed = target, seed
        self._sentinels = find_sentinels(tokenizer, config.sentinels)
        needed = max(denoiser.counts(max_length)[1] for denoiser in self._denoisers)
        if needed > len(self._sentinels):
            raise ConfigError(
                f"Texts of {max_length:,} tokens need {needed:,} sentinels; there are {len(self._sentinels):,}.",
                where="data.max_seq_len, objective.sentinels",
                fix="use a smaller data.max_seq_len or longer spans (objective.mean_length)",
            )
        self._end = _token(tokenizer, tokenizer.eos_token_id, "end-of-text token")
        self._modes = {mode: _added(tokenizer, token) for mode, token in config.mode_tokens.items()}

    def __call__(self, samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
        """Returns sources, and targets in the columns of the decoder."""
        return [self._corrupt(sample.input_ids, place) for sample, place in zip(samples, places, strict=True)]

    def _corrupt(self, ids: Ids, place: Place) -> Sample:
        draw = Counters(self._seed, place)
        denoiser = self._denoisers[int(draw.below(Purpose.DENOISER, 1, len(self._denoisers))[0])]
        source, target = split_spans(ids, denoiser.mask(len(ids), draw), self._sentinels, self._end)
        if self._modes:
            source = np.concatenate([[self._modes[denoiser.mode]], source])
        return self._target.sample(source, target)


def denoisers(config: Span) -> tuple[Denoiser, ...]:
    """Returns the denoisers of a style."""
    return UL2 if config.style == "ul2" else (Denoiser(config.density, config.mean_length),)


def split_spans(ids: npt.NDArray[Any], noise: Mask, sentinels: npt.NDArray[Any], end: int) -> tuple[Any, Any]:
    """Returns the source and the target of a text.

    The k-th removed span is the k-th sentinel in the source; the k-th part that was kept is the k-th sentinel in the
    target. There is no sentinel after the last span.

    Source: google-research/t5, ``noise_span_to_unique_sentinel`` and ``nonnoise_span_to_unique_sentinel``.

    Args:
        ids: The text, [L].
        noise: The tokens that are removed, bool [L].
        sentinels: The sentinels in order.
        end: The end-of-text token, which ends both.
    """

    def replace(removed: Mask) -> npt.NDArray[Any]:
        first = removed & ~np.concatenate([[False], removed[:-1]])
        numbers = np.cumsum(first) - 1
        assert numbers.max(initial=-1) < len(sentinels), "too few sentinels"
        with_sentinels = np.where(first, sentinels[numbers.clip(0)], ids)
        return np.append(with_sentinels[~removed | first], end)

    return replace(noise), replace(~noise)


def corrupted_lengths(length: int, chosen: Sequence[Denoiser], modes: Mapping[str, str]) -> tuple[int, int]:
    """Returns the most tokens that the source and the target of a text of ``length`` tokens can have."""
    sizes = [denoiser.counts(length) for denoiser in chosen]
    source = max(length - noise + spans for noise, spans in sizes) + 1 + bool(modes)
    return source, max(noise + max(spans, 1) for noise, spans in sizes) + 1


def longest_text(room: int, chosen: Sequence[Denoiser], modes: Mapping[str, str]) -> int:
    """Returns the most tokens that a text may have so that its source fits into ``room`` tokens.

    At a density of 0.5, a text whose target would be longer than ``room`` has one token less.

    Source: google-research/t5, ``random_spans_helper``.
    """
    length = max(room - 1 - bool(modes), 1)
    while corrupted_lengths(length + 1, chosen, modes)[0] <= room:
        length += 1
    halves = len(chosen) == 1 and chosen[0].density == 0.5
    return length - (halves and corrupted_lengths(length, chosen, modes)[1] > room)


def find_sentinels(tokenizer: Tokenizer, pattern: str) -> Ids:
    """Returns the sentinels of a tokenizer in order, int32.

    Args:
        tokenizer: The tokenizer.
        pattern: Their names, with ``{}`` for the number.

    Raises:
        ConfigError: There are none.
    """
    to_id = tokenizer.backend_tokenizer.token_to_id
    found = [*takewhile(lambda index: index is not None, (to_id(pattern.replace("{}", str(k))) for k in count()))]
    if not found:
        raise ConfigError(
            f"The tokenizer has no sentinel {pattern.replace('{}', '0')}.",
            where="objective.sentinels",
            fix="name the tokenizer's own sentinels with {} for their number, or use --objective.style=bart",
        )
    return np.array(found, np.int32)


def _compose(total: int, parts: int, draw: Counters, purpose: Purpose) -> Integers:
    """Returns positive numbers that add up to ``total``; all of their sequences are equally likely."""
    cuts = draw.choose(purpose, total - 1, parts - 1) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _added(tokenizer: Tokenizer, token: str) -> int:
    return _token(tokenizer, tokenizer.backend_tokenizer.token_to_id(token), f"mode token {token}")


def _token(tokenizer: Tokenizer, index: Any, name: str) -> int:
    if index is None:
        raise ConfigError(
            f"The tokenizer has no {name}.", where="model.tokenizer", fix="use the tokenizer of an encoder-decoder"
        )
    return int(index)
