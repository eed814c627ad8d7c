"""Labels and numbers from the logits of a classification head.

Legend: D documents, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingle.evaluation.scorers import Prediction, Problem
from ingle.evaluation.statistics import Floats


def decode_classes(logits_DC: Floats, names: Sequence[str], problem: Problem) -> list[Prediction]:
    """Returns the prediction of each document.

    Args:
        logits_DC: Output of the head, [D, C]; [D, 1] for numbers.
        names: The labels in the order of the outputs.
        problem: ``single`` takes the most likely label, ``multi`` each label with a probability of at least 0.5.
    """
    logits_DC = logits_DC.astype(np.float64)
    if problem == "regression":
        return [Prediction(scores=(float(row[0]),)) for row in logits_DC]
    chosen: list[tuple[int, ...]]
    if problem == "multi":
        logps_DC = -np.logaddexp(0.0, -logits_DC)
        chosen = [tuple(np.flatnonzero(row >= 0).tolist()) for row in logits_DC]
    else:
        logps_DC = log_softmax(logits_DC)
        chosen = [(int(row.argmax()),) for row in logps_DC]
    return [
        Prediction(tuple(names[label] for label in labels), tuple(row.tolist()))
        for labels, row in zip(chosen, logps_DC, strict=True)
    ]


def log_softmax(logits: Floats) -> Floats:
    """Returns the logarithm of the probabilities over the last dimension."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
