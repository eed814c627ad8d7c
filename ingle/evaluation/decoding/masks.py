"""Fills of masks: the most likely tokens at each mask of a text.

Legend: M masks, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ingle.evaluation.decoding.classes import log_softmax
from ingle.evaluation.statistics import Floats


class Fill(NamedTuple):
    """A token for a mask, and its probability."""

    token_id: int
    probability: float


def find_fills(logits_MV: Floats, top: int, num_tokens: int | None = None) -> list[list[Fill]]:
    """Returns the most likely tokens of each mask, the most likely first.

    Args:
        logits_MV: Logits of the language modelling head at the masks.
        top: Number of tokens per mask.
        num_tokens: Size of the vocabulary, where the head has more outputs; the others are no tokens.
    """
    probabilities_MV = np.exp(log_softmax(logits_MV[:, :num_tokens].astype(np.float64)))
    best_MV = np.argsort(-probabilities_MV, axis=1, kind="stable")[:, :top]
    return [[Fill(int(i), float(row[i])) for i in best] for row, best in zip(probabilities_MV, best_MV, strict=True)]
