"""Rollouts: sampled answers with what reinforcement learning needs to know about each token.

A token is drawn with noise from counters: seed, draw, answer and position of the token. So an answer needs no state of
a random stream, and an interrupted one ends with the same tokens.

Legend: T tokens of an answer, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle.data.counters import Bits, Purpose, bits_at
from ingle.kernels.layers.logits import LogitTransform
from ingle.kernels.layers.sampling import Drawn, draw
from ingle.models.generation.stop_criteria import Answer, StopCriteria

#: How an answer ended: end token, stop string, ``max_new_tokens``, or the end of the model's context.
Status = Literal["stop", "string", "length", "context"]


class Request(NamedTuple):
    """An answer to sample.

    Attributes:
        draw: Number of the prompt in the run; a prompt that is drawn again has another.
        answer: Number of the answer in its group.
        prompt: Tokens of the prompt.
        max_new_tokens: Maximum length of the answer, in tokens.
        begun: First tokens of the answer, which are kept as they are; the following ones are the same as if they had
            been drawn.
    """

    draw: int
    answer: int
    prompt: Sequence[int]
    max_new_tokens: int
    begun: Sequence[int] = ()


class Rollout(NamedTuple):
    """A sampled answer.

    Attributes:
        draw: As in its request.
        answer: As in its request.
        ids: Its tokens with the one that ended it, int32 [T].
        logps: Log-probability of each token at the sampling temperature in nats, float32 [T].
        entropies: Entropy of the distribution that each token was drawn from, in nats, float32 [T].
        status: How it ended.
    """

    draw: int
    answer: int
    ids: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    status: Status


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        seed: Seed of the run.
        temperature: Logits are divided by it, after a softcap; 0 takes the most likely token, and log-probabilities are
            those at temperature 1.
        top_p: Draw from the most likely tokens that together reach this probability. Below 1, log-probabilities are of
            that distribution.
        stop: Strings that end an answer.
        num_slots: Answers that grow together.
        prefill_tokens: Tokens of prompts that are read together.
    """

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    num_slots: int = 64
    prefill_tokens: int = 256


class Sampler(Protocol):
    """Samples answers with the weights that the model has at the time."""

    @property
    def is_invariant(self) -> bool:
        """Whether a token depends on weights, prompt, seed, draw, answer and position alone, to the bit."""

    @property
    def note(self) -> str | None:
        """A sentence on why answers are sampled more slowly, or depend on others; None if they do not."""

    def run(self, requests: Iterable[Request], *, stop: Callable[[], bool]) -> Iterator[Rollout]:
        """Yields the answers as they finish.

        The model is in evaluation mode until the iterator is exhausted or closed.

        Args:
            requests: This rank's answers. Those of one group should be adjacent. If forward passes are collective, all
                ranks call this together, with any number of requests.
            stop: Called once per token; when it is true (on any rank, if passes are collective), the iterator ends
                after that token, and answers that still grow are lost.

        Raises:
            ModelError: A prompt is empty, longer than the model's context, or has a token that the model lacks.
        """


def noise_keys(seed: int, draws: npt.ArrayLike, answers: npt.ArrayLike, positions: npt.ArrayLike) -> Bits:
    """Returns the keys of the noise that tokens are drawn with, uint64 [N].

    Args:
        seed: Seed of the run.
        draws: ``Rollout.draw`` of each token, [N].
        answers: ``Rollout.answer`` of each token, [N].
        positions: Its place in the answer, from 0, [N].
    """
    return bits_at(seed, Purpose.SAMPLE, draws, answers, positions)


class GrowingRollout:
    """An answer that grows.

    Args:
        request: What was asked for.
        criteria: What ends an answer.
        room: Tokens that fit into the model's context behind the prompt; None for any number.
    """

    def __init__(self, request: Request, criteria: StopCriteria, room: int | None) -> None:
        self.request = request
        self._answer, self._end_ids = Answer(criteria), criteria.end_ids
        self._longest = request.max_new_tokens if room is None else min(request.max_new_tokens, room)
        self._ids: list[int] = []
        self._logps: list[float] = []
        self._entropies: list[float] = []
        self._status: Status = "length" if self._longest == request.max_new_tokens else "context"

    @property
    def position(self) -> int:
        """The place of the next token in the answer."""
        return len(self._ids)

    @property
    def latest(self) -> int:
        """The latest token of the text."""
        return self._ids[-1] if self._ids else int(self.request.prompt[-1])

    @property
    def forced(self) -> int:
        """The next token if the request names it; else -1."""
        begun = self.request.begun
        return int(begun[self.position]) if self.position < len(begun) else -1

    def add(self, token: int, logp: float, entropy: float) -> bool:
        """Adds a token; returns whether the answer is complete."""
        self._ids.append(token)
        self._logps.append(logp)
        self._entropies.append(entropy)
        if self._answer.add(token):
            self._status = "stop" if token in self._end_ids else "string"
            return True
        return self.position >= self._longest

    def finish(self) -> Rollout:
        """Returns the complete answer."""
        return Rollout(
            self.request.draw,
            self.request.answer,
            np.array(self._ids, np.int32),
            np.array(self._logps, np.float32),
            np.array(self._entropies, np.float32),
            self._status,
        )


class Draws:
    """Draws the next tokens of growing answers.

    Args:
        sampling: How answers are sampled.
        transform: What the architecture does with its raw logits.
    """

    def __init__(self, sampling: Sampling, transform: LogitTransform) -> None:
        self._sampling = sampling
        self._transform = transform.at(sampling.temperature or 1.0)

    def add(self, logits_BV: Tensor, growing: Mapping[int, GrowingRollout]) -> list[int]:
        """Draws the next token of each answer from its raw logits, and adds it.

        Returns:
            The keys of the answers that are complete.
        """
        figures = (values.tolist() for values in self.draw(logits_BV, list(growing.values())))
        return [key for (key, answer), *each in zip(growing.items(), *figures, strict=True) if answer.add(*each)]

    def draw(self, logits_BV: Tensor, growing: Sequence[GrowingRollout]) -> Drawn:
        """Returns the next token of each answer, from raw logits."""
        numbers = [(each.request.draw, each.request.answer, each.position, each.forced) for each in growing]
        draws, answers, positions, forced = zip(*numbers, strict=True)
        keys = noise_keys(self._sampling.seed, draws, answers, positions) if self._sampling.temperature > 0 else None
        fixed = torch.tensor(forced, device=logits_BV.device) if max(forced) >= 0 else None
        return draw(logits_BV, keys, self._transform, top_p=self._sampling.top_p, forced=fixed)
