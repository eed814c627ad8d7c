"""Slots of answers that grow together: which answer is in which slot, and which tokens the next pass reads.

The order of the passes may depend on anything; the tokens cannot.

Legend: M tokens of a pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ingle.data.counters import Integers
from ingle.kernels.attention.cached import Places
from ingle.models.generation.rollout import GrowingRollout, Request
from ingle.models.generation.store import WASTE, PromptRows, Segment, rows_for_prompts


class Pass(NamedTuple):
    """Tokens that are read together.

    Attributes:
        ids: ``[1, M]``.
        position_ids: ``[1, M]``.
        places: Where they are stored, and what they continue.
    """

    ids: Tensor
    position_ids: Tensor
    places: Places


@dataclass(slots=True)
class _Waiting:
    request: Request
    segment: Segment | None = None


class _Slot(NamedTuple):
    growing: GrowingRollout
    segment: Segment


class Slots:
    """Answers that grow together, and those that wait.

    Args:
        requests: The answers.
        begin: Makes an answer that grows.
        num_slots: Answers that grow together.
        prefill_tokens: Tokens of prompts that are read together.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        begin: Callable[[Request], GrowingRollout],
        num_slots: int,
        prefill_tokens: int,
    ) -> None:
        self._begin, self._prefill_tokens = begin, prefill_tokens
        self._waiting = deque(map(_Waiting, requests))
        self._slots: list[_Slot | None] = [None] * num_slots
        prompt_rows = rows_for_prompts(requests, num_slots, prefill_tokens)
        self._prompts = PromptRows(prompt_rows)
        self._first_row = 1 + prompt_rows
        self._width = max((request.max_new_tokens for request in requests), default=1)
        self.num_rows = self._first_row + num_slots * self._width

    def enter(self) -> None:
        """Puts answers whose prompts have been read into free slots."""
        for index, slot in enumerate(self._slots):
            if not self._waiting:
                return
            if slot is None:
                segment = self._claim(self._waiting[0])
                if segment is None or not segment.is_ready:
                    return
                self._slots[index] = _Slot(self._begin(self._waiting.popleft().request), segment)

    @property
    def growing(self) -> dict[int, GrowingRollout]:
        """The answers that grow, by slot."""
        return {index: slot.growing for index, slot in enumerate(self._slots) if slot is not None}

    @property
    def needs_prompts(self) -> bool:
        """Whether a slot is free, and the next answer waits for its prompt."""
        if not self._waiting or all(self._slots):
            return False
        segment = self._claim(self._waiting[0])
        return segment is not None and not segment.is_ready

    def free(self, index: int) -> None:
        """Frees the slot of an answer that is complete."""
        slot = self._slots[index]
        assert slot is not None
        slot.segment.users -= 1
        self._slots[index] = None

    def prompt_pass(self) -> Pass:
        """Returns the next tokens of prompts: those of the next answers, as many as fit."""
        columns: list[tuple[int, int, int, int, int]] = []
        for segment in self._unread():
            stop = min(len(segment.ids), segment.read + self._prefill_tokens - len(columns))
            columns += [
                (segment.ids[place], segment.start + place, segment.start, len(segment.ids), place)
                for place in range(segment.read, stop)
            ]
            segment.read = stop
            if len(columns) == self._prefill_tokens:
                break
        columns += [(0, WASTE, WASTE, 1, 0)] * (self._prefill_tokens - len(columns))
        numbers = np.array(columns, np.int64)
        own_start = np.zeros(len(numbers), np.int64)
        return _pass(numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3], own_start, numbers[:, 4])

    def token_pass(self, chosen: Sequence[int], size: int) -> Pass:
        """Returns the latest tokens of the answers in these slots, at the first of ``size`` places."""
        numbers = np.zeros((size, 5), np.int64)
        for place, index in enumerate(chosen):
            slot = self._slots[index]
            assert slot is not None
            (growing, segment), own_start = slot, self._first_row + index * self._width
            numbers[place] = growing.latest, own_start + growing.position, segment.start, len(segment.ids), own_start
        ids, rows, starts, lengths, own_starts = numbers.T.copy()
        return _pass(ids, rows, starts, lengths, own_starts, lengths + rows - own_starts)

    def _unread(self) -> Iterator[Segment]:
        for waiting in self._waiting:
            segment = self._claim(waiting)
            if segment is None:
                return
            if not segment.is_ready:
                yield segment

    def _claim(self, waiting: _Waiting) -> Segment | None:
        """Returns the segment of a waiting answer; answers claim them in their order, so the next one gets room."""
        if waiting.segment is None:
            waiting.segment = self._prompts.claim(waiting.request)
        return waiting.segment


def _pass(ids: Integers, rows: Integers, starts: Integers, lengths: Integers, owns: Integers, at: Integers) -> Pass:
    """Returns a pass over tokens at the positions ``at`` of their texts; for the rest see :class:`Places`."""
    places = Places(torch.from_numpy(rows), np.stack((starts, lengths, owns, at), 1))
    return Pass(torch.from_numpy(ids)[None], torch.from_numpy(at)[None], places)
