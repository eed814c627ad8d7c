"""Passes of a model over tokens whose earlier keys are stored, and a check of what their results depend on.

Legend: M tokens of a pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ingle.kernels.attention.cached import KeyStore
from ingle.models.forward.encoder_decoder import Row
from ingle.models.forward.hidden_states import computed_in, device_of, forward_packed, forward_stored
from ingle.models.generation.batch_sampler import raw_logits_of
from ingle.models.generation.rollout import GrowingRollout, Request, Sampling
from ingle.models.generation.slots import Pass, Slots
from ingle.models.generation.stop_criteria import StopCriteria
from ingle.models.text_limits import text_limit
from ingle.models.text_part import text_config

#: Fewest places of a smaller token pass that is tried.
_FEWEST = 8
#: Tokens of the prompts and of the answers that are tried.
_PROMPTS, _NEW_TOKENS = (9, 2, 5), 4
#: Largest relative difference of the hidden states of a token from those of its text alone, as in
#: :mod:`ingle.models.forward.prompt_sharing`.
_TOLERANCE = {torch.float32: 1e-3}
_ROUNDED_TOLERANCE = 0.2


class Passes:
    """The passes over the texts of some slots.

    Args:
        model: The model.
        slots: The texts.
        longest: Tokens of the longest text.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, longest: int) -> None:
        self._model, self._longest = model, longest
        self._store = KeyStore(slots.num_rows)
        self.logits = raw_logits_of(model)

    def hidden(self, tokens: Pass) -> Tensor:
        """Returns the hidden states, ``[M, H]``."""
        self._store.begin(tokens.places)
        device = device_of(self._model)
        ids, positions = tokens.ids.to(device), tokens.position_ids.to(device)
        return forward_stored(self._model, ids, positions, self._longest, self._store)[0]


class Findings(NamedTuple):
    """What :func:`try_passes` found.

    Attributes:
        is_right: Whether the results are those of the texts alone, but for rounding.
        is_invariant: Whether the bits of a token depend on its text alone.
        sizes: Numbers of places for which a token pass has the same bits, ascending.
    """

    is_right: bool
    is_invariant: bool
    sizes: tuple[int, ...]


@torch.no_grad()
def try_passes(model: PreTrainedModel, sampling: Sampling, criteria: StopCriteria) -> Findings:
    """Tries short texts: at other places, in another order, with and without others, and in smaller passes.

    All ranks call it together, and make the same passes.
    """
    texts = _texts(model, sampling.num_slots)
    one, other = (_Trial(model, order, sampling, criteria) for order in (texts, texts[::-1]))
    sizes = [size for size in _halves(sampling.num_slots) if size >= _FEWEST]
    second = min(1, len(texts) - 1)
    is_invariant, equal = True, dict.fromkeys(sizes, True)
    for _ in range(_NEW_TOKENS):
        everyone = range(len(texts))
        smaller = {size: one.logits(range(size), size) for size in sizes}
        alone_1V, moved_MV = (
            one.logits([second], sampling.num_slots),
            other.logits(everyone, sampling.num_slots).flip(0),
        )
        logits_MV = one.logits(everyone, sampling.num_slots)  # last, because each pass replaces the stored keys
        is_invariant &= torch.equal(moved_MV, logits_MV) and torch.equal(alone_1V[0], logits_MV[second])
        equal = {size: equal[size] and torch.equal(logits, logits_MV[:size]) for size, logits in smaller.items()}
        one.grow()
        other.grow()
    sizes = [size for size in reversed(sizes) if equal[size] and is_invariant]
    return Findings(_is_right(model, one, sampling), is_invariant, (*sizes, sampling.num_slots))


class _Trial:
    """Texts whose tokens are known."""

    def __init__(
        self, model: PreTrainedModel, texts: Sequence[Request], sampling: Sampling, criteria: StopCriteria
    ) -> None:
        free = StopCriteria(criteria.tokenizer, (), frozenset())
        self.texts = texts
        self._slots = Slots(
            texts, lambda request: GrowingRollout(request, free, None), len(texts), sampling.prefill_tokens
        )
        self._passes = Passes(model, self._slots, max(_PROMPTS) + _NEW_TOKENS)
        while len(self._slots.growing) < len(texts):
            self._slots.enter()
            if self._slots.needs_prompts:
                self._passes.hidden(self._slots.prompt_pass())

    def hidden(self, chosen: Sequence[int], size: int) -> Tensor:
        """Returns the hidden states of the latest tokens of some texts, in a pass with ``size`` places."""
        return self._passes.hidden(self._slots.token_pass(chosen, size))

    def logits(self, chosen: Sequence[int], size: int) -> Tensor:
        """Returns the raw logits after the latest tokens of some texts."""
        return self._passes.logits(self.hidden(chosen, size))[: len(chosen)]

    def grow(self) -> None:
        """Adds the next token to each text."""
        for growing in self._slots.growing.values():
            growing.add(growing.forced, 0.0, 0.0)


def _is_right(model: PreTrainedModel, trial: _Trial, sampling: Sampling) -> bool:
    chosen = range(min(len(_PROMPTS), len(trial.texts)))
    found = trial.hidden(chosen, sampling.num_slots)[: len(chosen)]
    texts = [torch.tensor([*text.prompt, *text.begun[:_NEW_TOKENS]]) for text in trial.texts[: len(chosen)]]
    row = Row.of([text.to(found.device) for text in texts])
    wanted = forward_packed(model, row.ids, row.position_ids, row.cu_seqlens)[0, row.cu_seqlens[1:].long() - 1]
    errors = (found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1).clamp_min(1e-30)
    # The median: rounding may make a router send a single token to another expert.
    return float(errors.median()) <= _TOLERANCE.get(computed_in(model), _ROUNDED_TOLERANCE)


def _texts(model: PreTrainedModel, count: int) -> list[Request]:
    """Returns texts of three prompts that fit into the context, in turns."""
    num_ids = min(64, int(getattr(text_config(model.config), "vocab_size", 64)))
    room = (text_limit(model) or 1 << 30) - _NEW_TOKENS

    def tokens(first: int, length: int) -> list[int]:
        return [(first + 7919 * place) % num_ids for place in range(length)]

    prompts = [tokens(11 + 3 * number, min(length, room)) for number, length in enumerate(_PROMPTS)]
    # One token more than are read, so that the last one is known as well.
    return [
        Request(0, answer, prompts[answer % 3], _NEW_TOKENS + 1, tokens(17 * answer, _NEW_TOKENS + 1))
        for answer in range(count)
    ]


def _halves(number: int) -> Iterator[int]:
    while number % 2 == 0:
        number //= 2
        yield number
