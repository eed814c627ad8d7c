"""Tags of words, and tagged spans with characters, from the logits of a token classification head.

Legend: W words, C tags.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ingle.evaluation.decoding.classes import log_softmax
from ingle.evaluation.scorers import Prediction
from ingle.evaluation.statistics import Floats
from ingle.evaluation.tag_schemes import Entity, find_entities

_SCHEME_TAG = re.compile("O|[BIELSU](-.+)?")


@dataclass(frozen=True, slots=True)
class TaggedSpan:
    """A tagged part of a text.

    Attributes:
        label: Type of the entity, or the tag if tags mark single words.
        start: First character.
        end: Character after the last one.
        text: The characters.
        score: Mean probability of its tags.
    """

    label: str
    start: int
    end: int
    text: str
    score: float


def decode_tags(logits_WC: Floats, names: Sequence[str]) -> Prediction:
    """Returns the most likely tag of each word and the logarithm of its probability.

    Args:
        logits_WC: Output of the head at the first token of each word; NaN in the rows of words without a token, which
            get the tag ``O``, or the first one.
        names: The tags in the order of the outputs.
    """
    outside = names.index("O") if "O" in names else 0
    has_token_W = np.asarray(~np.isnan(logits_WC).any(axis=1))
    logps_WC = log_softmax(np.where(has_token_W[:, None], logits_WC, 0.0).astype(np.float64))
    tags_W = np.where(has_token_W, logps_WC.argmax(axis=1), outside)
    logps_W = np.where(has_token_W, np.take_along_axis(logps_WC, tags_W[:, None], axis=1)[:, 0], 0.0)
    return Prediction(tuple(names[tag] for tag in tags_W), tuple(logps_W.tolist()))


def marks_entities(names: Iterable[str]) -> bool:
    """Returns whether tags are those of a scheme, so that several words can form an entity."""
    names = list(names)
    return "O" in names and all(_SCHEME_TAG.fullmatch(name) for name in names)


def find_spans(
    text: str, words: Sequence[tuple[int, int]], prediction: Prediction, names: Iterable[str], scheme: str = "auto"
) -> list[TaggedSpan]:
    """Returns the entities of a text; with tags of no scheme (such as parts of speech), every word.

    Args:
        text: The text.
        words: Characters from and to (exclusive) of its words.
        prediction: A tag per word, with the logarithm of its probability.
        names: All tags of the model.
        scheme: How tags are read, see :func:`ingle.evaluation.tag_schemes.find_entities`.
    """
    if marks_entities(names):
        entities = find_entities(prediction.labels, scheme)
    else:
        entities = [Entity(tag, place, place) for place, tag in enumerate(prediction.labels)]
    spans = []
    for kind, first, last in entities:
        start, end = words[first][0], words[last][1]
        score = math.fsum(math.exp(logp) for logp in prediction.scores[first : last + 1]) / (last - first + 1)
        spans.append(TaggedSpan(kind, start, end, text[start:end], score))
    return spans
