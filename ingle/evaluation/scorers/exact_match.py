"""Exact match: is the answer one of the references, letter by letter, but for white space?

With ``answer_pattern`` only a part of the answer is compared: the first group of the pattern's last match, so that
a worked solution may precede its result.  An answer without a match is wrong and counted as unparsed, because a
model that reasons well and formats badly needs another remedy than one that reasons badly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import numpy as np

from ingle.errors import EvaluationError
from ingle.evaluation.scorers.base import Kind, Outputs, Scores, mean_of_ratio
from ingle.evaluation.stats import Floats

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


class ExactMatch:
    """Share of answers equal to one of their references.

    Args:
        answer_pattern: Regular expression with one group, or None to compare whole answers.

    Raises:
        EvaluationError: The pattern is not a valid regular expression, or has no group.
    """

    name = "exact_match"
    kind: Kind = "rate"
    higher_is_better = True
    reads: Literal["answers", "likelihoods"] = "answers"

    def __init__(self, answer_pattern: str | None = None) -> None:
        self._pattern = None if answer_pattern is None else _compile(answer_pattern)

    def score(self, outputs: Outputs, references: Sequence[Sequence[str]]) -> Scores:
        """1 where the answer equals any reference, else 0."""
        found = [self._part(answer) for answer in outputs.answers]
        right = np.array(
            [
                part is not None and part in {self._reference_part(target) for target in targets}
                for part, targets in zip(found, references, strict=True)
            ],
            dtype=np.float64,
        )
        return Scores(
            value=float(right.mean()),
            per_sample=right,
            statistics=np.stack((right, np.ones_like(right)), axis=1),
            signature=f"case:mixed|space:collapsed|pattern:{self._pattern.pattern if self._pattern else 'none'}",
            num_unparsed=sum(part is None for part in found),
        )

    def aggregate(self, totals: Floats) -> Floats:
        """Share of right answers."""
        return mean_of_ratio(totals)

    def _part(self, text: str) -> str | None:
        """What of a text is compared, or None where the pattern is nowhere."""
        if self._pattern is None:
            return collapse(text)
        matches = list(self._pattern.finditer(text))
        group: str | None = matches[-1].group(1) if matches else None
        return None if group is None else normalize_number(collapse(group))

    def _reference_part(self, text: str) -> str:
        """As :meth:`_part`; a reference without a match is taken whole, since it may be the bare result."""
        part = self._part(text)
        return normalize_number(collapse(text)) if part is None else part


def collapse(text: str) -> str:
    """The text without outer white space, each inner run of it one space."""
    return " ".join(text.split())


def normalize_number(text: str) -> str:
    """One spelling for each number (``$1,000.00`` and ``1000`` are equal); anything else unchanged."""
    bare = _THOUSANDS.sub("", text).lstrip("$£€¥ ").rstrip()
    if not _NUMBER.fullmatch(bare):
        return text
    number = Decimal(bare).normalize()
    return "0" if number == 0 else f"{number:f}"


def _compile(answer_pattern: str) -> re.Pattern[str]:
    where = "evaluate.answer_pattern"
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise EvaluationError(
            f"The answer pattern {answer_pattern!r} is not a valid regular expression.",
            where=where,
            why=str(error),
            fix="correct it, for example '#### *(.+)'",
        ) from error
    if pattern.groups < 1:
        raise EvaluationError(
            f"The answer pattern {answer_pattern!r} has no group, so it does not say what to compare.",
            where=where,
            fix="put parentheses around the answer, for example '#### *(.+)'",
        )
    return pattern
