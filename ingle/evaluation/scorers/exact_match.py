"""Exact match: whether the answer equals one of the references, except for white space.

With ``answer_pattern``, only a part of the answer is compared: the first group of the last match, so that a worked
solution may precede the result. An answer without a match is wrong. Such answers are also counted, because wrong
formatting has another cause than wrong reasoning.
"""

from __future__ import annotations

import re

from ingle.errors import EvaluationError
from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, mean_scores
from ingle.report.metrics import METRICS
from ingle.rewards.matching import collapse, normalize_number


class ExactMatch(Scorer):
    """Share of answers equal to one of their references.

    Args:
        answer_pattern: Regular expression with a group, or None to compare whole answers.

    Raises:
        EvaluationError: The pattern is not a valid regular expression, or has no group.
    """

    metric = METRICS["exact_match"]

    def __init__(self, answer_pattern: str | None = None) -> None:
        self._pattern = None if answer_pattern is None else _compile(answer_pattern)

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores 1 where the answer equals any reference, else 0."""
        found = [self._part(answer) for answer in outputs.answers]
        right = [
            part is not None and part in {self._reference_part(target) for target in targets}
            for part, targets in zip(found, references, strict=True)
        ]
        pattern = self._pattern.pattern if self._pattern else "none"
        return mean_scores(right, f"case:mixed|space:collapsed|pattern:{pattern}", found.count(None))

    def _part(self, text: str) -> str | None:
        """Returns the part of a text that is compared; None if the pattern does not match."""
        if self._pattern is None:
            return collapse(text)
        matches = list(self._pattern.finditer(text))
        group: str | None = matches[-1].group(1) if matches else None
        return None if group is None else normalize_number(collapse(group))

    def _reference_part(self, text: str) -> str:
        """Returns the part of a reference; without a match all of it, since it may be the bare result."""
        part = self._part(text)
        return normalize_number(collapse(text)) if part is None else part


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
            f"The answer pattern {answer_pattern!r} has no group.",
            where=where,
            why="the first group is the part that is compared",
            fix="put parentheses around the answer, for example '#### *(.+)'",
        )
    return pattern
