"""Rows of preferences and judgements: every answer is one document with its prompt, or a source and a target.

The answers of a row that are compared with one another are adjacent documents of the row. Judged answers stand alone: a
row of ``kto`` has one, and of a pair, the chosen one is good and the rejected one is bad.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ingle.config.objective import FAMILY
from ingle.data.encode_answers import AnswerEncoder, ConversationAnswers
from ingle.data.encode_text_answers import TextAnswers
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.types import Example, Tokenizer
from ingle.errors import ConfigError

#: The threshold of scores that are 1 and 0.
_HALF = 0.5


class _Scored(NamedTuple):
    """An answer with its prompt, its name in the row, and its score."""

    name: str
    text: Example
    score: float


class PreferenceEncoder:
    """Tokenizes rows with scored answers.

    A row is dropped if it compares nothing: equal answers, equal scores, or a single answer.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.

    Raises:
        ConfigError: ``too_long: split``.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        options.refuse_split("An answer")
        self._options = options
        self._is_judged = FAMILY[options.objective] == "judged"
        is_causal = options.model_kind == "causal"
        self._form: AnswerEncoder = (
            ConversationAnswers(tokenizer, options) if is_causal else TextAnswers(tokenizer, options)
        )

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the documents of each row that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`.

        Every document has the columns ``scores`` and ``truncated``: whether its answer lost its end.

        Raises:
            DataError: A template refuses a row or cannot be masked, or an answer does not end in an end of turn.
            ConfigError: Scores are to be judged without a threshold.
            ModelError: The chat template takes too much time or memory.
        """
        rows = []
        for example in examples:
            answers = self._read(example)
            fault = self._find_fault(answers)
            if fault is not None:
                counts.dropped.add(fault, example.origin)
                continue
            for remark in example.remarks:
                counts.remarks.add(remark, example.origin)
            rows.append((example, answers))
        encoded = self._form.encode([[each.text for each in answers] for _, answers in rows])
        for (example, answers), (found, own) in zip(rows, encoded, strict=True):
            yield from self._keep(example, answers, found, own, counts)

    def _read(self, example: Example) -> list[_Scored]:
        """Returns the answers of a row that have a score; scores are 1 and 0 where answers are judged."""
        if self._is_judged:
            scored = [(name, text) for name, text in _texts(example) if _score(text) is not None]
            return [_Scored("", text, self._judge(text, name)) for name, text in scored]
        return [_Scored(name, text, score) for name, text in _texts(example) if (score := _score(text)) is not None]

    def _judge(self, text: Example, name: str) -> float:
        if name in ("chosen", "rejected"):
            return float(name == "chosen")
        score, threshold = _score(text), self._options.threshold
        assert score is not None, text.origin
        if threshold is None and score not in (0, 1):
            raise ConfigError(
                "Scores become good and bad answers only with a threshold.",
                where=f"objective.threshold, {text.origin}",
                why=f"the score is {score:g}",
                fix="--objective.threshold=NUMBER; answers with a higher score are good",
            )
        return float(score > (_HALF if threshold is None else threshold))

    def _find_fault(self, answers: Sequence[_Scored]) -> str | None:
        """Returns why there is nothing to learn from a row; None if there is."""
        if len(answers) < (1 if self._is_judged else 2):
            return "No answer has a score." if self._is_judged else "Fewer than two answers have a score."
        first = answers[0]
        if len(answers) > 1 and all(_said(each.text) == _said(first.text) for each in answers):
            return "All answers are equal."
        if self._is_judged:
            return None
        if all(each.score == first.score for each in answers):
            return "All answers have the same score."
        if first.name == "chosen" and any(each.score > first.score for each in answers):
            return "The rejected answer has the higher score."
        return None

    def _keep(
        self,
        example: Example,
        answers: Sequence[_Scored],
        found: Sequence[Sequence[Piece] | str],
        own: Counts,
        counts: Counts,
    ) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the documents of a row, without the answers that could not be tokenized.

        Args:
            example: The row.
            answers: Its answers.
            found: Their documents, or why an answer is left out.
            own: What is cut or unusual in the row; it counts if the row is kept.
            counts: Those of all rows.
        """
        kept, reasons = [], []
        for answer, pieces in zip(answers, found, strict=True):
            if isinstance(pieces, str):
                reasons.append(pieces)
            else:
                kept.append((answer, [_label(piece, answer) for piece in pieces]))
        needed = 1 if self._is_judged else 2
        if len(kept) < needed or (not self._is_judged and len({answer.score for answer, _ in kept}) < needed):
            counts.dropped.add(reasons[0], example.origin)
            return
        counts.add(own)
        for reason in dict.fromkeys(reasons):
            counts.remarks.add(f"Single answers are left out: {reason}", example.origin)
        counts.cut_ends += sum(bool(pieces[-1].document_columns["truncated"]) for _, pieces in kept)
        if self._is_judged:
            yield from ((example, pieces) for _, pieces in kept)
        else:
            yield example, [piece for _, pieces in kept for piece in pieces]


def _texts(example: Example) -> list[tuple[str, Example]]:
    return list(example.texts.items()) or [("", example)]


def _score(text: Example) -> float | None:
    """Returns the score of an answer; None if it has none."""
    score = text.labels["scores"]
    assert isinstance(score, float), text.origin
    return None if math.isnan(score) else score


def _said(text: Example) -> Example:
    """Returns what an answer says, whatever its score."""
    return replace(text, labels={}, origin="")


def _label(piece: Piece, answer: _Scored) -> Piece:
    """Returns a document with its name and score; a source keeps its own name."""
    name = piece.name if piece.name == "source" else (answer.name or piece.name)
    return piece._replace(name=name, document_columns={"scores": np.float32(answer.score), **piece.document_columns})
