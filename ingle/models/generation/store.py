"""Rows of a key store: one for tokens that nobody needs, those of prompts, and those of the answers that grow.

A text in the store is its prompt without the last token, which all answers of a group share, and then the rest: the
last token of the prompt and the answer's own tokens. So every token of an answer comes from a pass of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingle.models.generation.rollout import Request

#: The row of tokens that nobody needs.
WASTE = 0


@dataclass(slots=True)
class Segment:
    """The shared part of a prompt.

    Attributes:
        ids: Its tokens.
        start: Its first row.
        read: How many of its tokens have been read.
        users: Answers that need it.
    """

    ids: tuple[int, ...]
    start: int
    read: int = 0
    users: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether answers can continue it."""
        return self.read == len(self.ids)


class PromptRows:
    """Rows for prompts: each gets the first gap that is long enough.

    A prompt that no answer needs stays until its rows are needed, because the next answer may be of its group.

    Args:
        num_rows: Rows for prompts, from row 1 on.
    """

    def __init__(self, num_rows: int) -> None:
        self._end = 1 + num_rows
        self._segments: dict[tuple[int, ...], Segment] = {}

    def claim(self, request: Request) -> Segment | None:
        """Returns the segment of a request's prompt, which stays until it is released; None if there is no room."""
        ids = _shared(request)
        segment = self._segments.get(ids)
        if segment is None:
            start = self._make_room(len(ids))
            if start is None:
                return None
            segment = self._segments[ids] = Segment(ids, start)
        segment.users += 1
        return segment

    def _make_room(self, length: int) -> int | None:
        start = self._find_gap(length)
        idle = [segment for segment in self._segments.values() if segment.users == 0]
        while start is None and idle:
            del self._segments[idle.pop(0).ids]
            start = self._find_gap(length)
        return start

    def _find_gap(self, length: int) -> int | None:
        begin = 1
        for segment in sorted(self._segments.values(), key=lambda each: each.start):
            if segment.start - begin >= length:
                break
            begin = max(begin, segment.start + len(segment.ids))  # an empty segment may begin at a used row
        return begin if begin + length <= self._end else None


def rows_for_prompts(requests: Sequence[Request], num_slots: int, prefill_tokens: int) -> int:
    """Returns how many rows prompts need: enough for as many as grow together, and for a pass over further ones."""
    lengths = sorted((len(ids) for ids in set(map(_shared, requests))), reverse=True)
    return min(sum(lengths), sum(lengths[:num_slots]) + prefill_tokens)


def _shared(request: Request) -> tuple[int, ...]:
    return tuple(request.prompt[:-1])
