"""Answers from the logits of a question answering head: the best legal span over all windows of a context.

The search is exact. Lists of the best starts and the best ends, which reference code combines, can miss the best span.

Legend: T tokens of a window.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ingle.evaluation.statistics import Floats


class AnswerWindow(NamedTuple):
    """A document of a question and part of its context.

    Attributes:
        spans_T2: Characters from and to (exclusive) of each token of the context, perhaps with white space at the ends;
            -1 for all other tokens, which stand before and after those of the context.
        null: Place of the token that means that there is no answer.
    """

    spans_T2: npt.NDArray[np.int32]
    null: int = 0


class FoundAnswer(NamedTuple):
    """A span of the context; ``start == end`` if the context contains no answer.

    Attributes:
        start: First character.
        end: Character after the last one.
        score: Sum of the logits of start and end; for no answer, the smallest of all windows.
    """

    start: int
    end: int
    score: float


def find_answers(
    context: str,
    windows: Sequence[AnswerWindow],
    logits: Sequence[Floats],
    *,
    max_answer_tokens: int = 30,
    num_best: int = 1,
    can_be_empty: bool = False,
    threshold: float = 0.0,
) -> list[FoundAnswer]:
    """Returns the best answers, the best first.

    A span that several windows contain counts once, with its best score. There is no answer if the empty answer beats
    the best span by more than ``threshold``: every window must agree that it contains none.

    Source: Devlin et al. 2019, arXiv 1810.04805, sections 4.2 and 4.3.

    Args:
        context: The context.
        windows: The windows.
        logits: Logits of start and end in each window, [T, 2].
        max_answer_tokens: Longest answer.
        num_best: Number of answers.
        can_be_empty: Whether there may be no answer.
        threshold: Least advantage of the empty answer.
    """
    found: dict[tuple[int, int], float] = {}
    for window, logits_T2 in zip(windows, logits, strict=True):
        for start, end, score in _best_in(window, logits_T2.astype(np.float64), max_answer_tokens, num_best):
            found[start, end] = max(score, found.get((start, end), -np.inf))
    spans = heapq.nsmallest(num_best, found.items(), key=lambda item: (-item[1], item[0]))
    answers = [_trimmed(context, start, end, score) for (start, end), score in spans]
    if can_be_empty or not answers:
        empty = min(
            float(each[window.null].astype(np.float64).sum()) for window, each in zip(windows, logits, strict=True)
        )
        wins = not answers or empty - answers[0].score > threshold
        answers.insert(0 if wins else len(answers), FoundAnswer(0, 0, empty))
    return answers[:num_best]


def _best_in(
    window: AnswerWindow, logits_T2: Floats, max_answer_tokens: int, num_best: int
) -> list[tuple[int, int, float]]:
    """Returns the best spans of each length as first character, character after the last one, and score."""
    places = np.flatnonzero(window.spans_T2[:, 0] >= 0)
    begins, stops = window.spans_T2[places].T.tolist()
    starts, ends = logits_T2[places].T
    spans = []
    for extra in range(min(max_answer_tokens, len(places))):
        totals = starts[: len(places) - extra] + ends[extra:]
        best = np.argsort(-totals, kind="stable")[:num_best]
        spans += [(begins[i], stops[i + extra], float(totals[i])) for i in best.tolist()]
    return spans


def _trimmed(context: str, start: int, end: int, score: float) -> FoundAnswer:
    text = context[start:end]
    return FoundAnswer(start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip()), score)
