"""Decoding logits of task heads: labels, tagged spans, answers and fills, against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ingle.data import Sample
from ingle.data.batch import Batch
from ingle.evaluation.decoding.answers import AnswerWindow, find_answers
from ingle.evaluation.decoding.classes import decode_classes
from ingle.evaluation.decoding.masks import find_fills
from ingle.evaluation.decoding.tags import TaggedSpan, decode_tags, find_spans
from ingle.evaluation.run.packed_logits import document_logits


def test_labels_and_probabilities_follow_the_problem() -> None:
    logits = np.array([[1.0, 3.0, -2.0]], dtype=np.float32)
    (single,) = decode_classes(logits, "abc", "single")
    assert single.labels == ("b",)
    assert np.exp(single.scores) == pytest.approx(np.exp(logits[0]) / np.exp(logits[0]).sum(), rel=1e-6)
    (multi,) = decode_classes(logits, "abc", "multi")
    assert multi.labels == ("a", "b")
    assert np.exp(multi.scores) == pytest.approx(1 / (1 + np.exp(-logits[0])), rel=1e-6)
    (number,) = decode_classes(np.array([[0.25]]), (), "regression")
    assert (number.labels, number.scores, str(number)) == ((), (0.25,), "0.25")
    (sure,) = decode_classes(np.array([[0.0, 900.0]]), "ab", "multi")
    assert sure.scores == (pytest.approx(math.log(0.5)), 0.0)


def test_entities_have_the_characters_of_their_words() -> None:
    text, names = "Angela  Merkel visited Paris.", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    words = [(0, 6), (8, 14), (15, 22), (23, 28), (28, 29)]
    logits = np.full((5, 5), -3.0)
    logits[np.arange(5), [1, 2, 0, 3, 0]] = 3.0
    logits[4] = np.nan  # a word without a token
    prediction = decode_tags(logits, names)
    assert prediction.labels == ("B-PER", "I-PER", "O", "B-LOC", "O")
    probability = math.exp(3) / (math.exp(3) + 4 * math.exp(-3))
    assert find_spans(text, words, prediction, names) == [
        TaggedSpan("PER", 0, 14, "Angela  Merkel", pytest.approx(probability)),
        TaggedSpan("LOC", 23, 28, "Paris", pytest.approx(probability)),
    ]


def test_tags_of_no_scheme_mark_single_words() -> None:
    names = ("DET", "NOUN", "O")
    prediction = decode_tags(np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), names)
    spans = find_spans("the cat", [(0, 3), (4, 7)], prediction, names)
    assert [(span.label, span.text) for span in spans] == [("DET", "the"), ("NOUN", "cat")]


def make_window(spans: list[tuple[int, int]], before: int) -> AnswerWindow:
    """A window with ``before`` tokens in front of the context, and one behind it."""
    return AnswerWindow(np.array([(-1, -1)] * before + spans + [(-1, -1)], np.int32))


@pytest.mark.parametrize("seed", range(30))
def test_answers_equal_the_best_of_all_legal_spans(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens = int(rng.integers(1, 60))
    context = "word " * num_tokens
    offsets = [(max(5 * token - 1, 0), 5 * token + 4) for token in range(num_tokens)]  # with the space before the word
    parts = [(start, min(start + 20, num_tokens)) for start in range(0, max(num_tokens - 6, 1), 14)]
    windows = [make_window(offsets[start:stop], before=6) for start, stop in parts]
    logits = [rng.normal(size=(len(window.spans_T2), 2)) * 2 for window in windows]
    expected: dict[tuple[int, int], float] = {}
    for (start, stop), each in zip(parts, logits, strict=True):
        for first in range(start, stop):
            for last in range(first, min(first + 6, stop)):
                score = each[first - start + 6, 0] + each[last - start + 6, 1]
                expected[first, last] = max(score, expected.get((first, last), -np.inf))
    best = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:5]
    found = find_answers(context, windows, logits, max_answer_tokens=6, num_best=5)
    assert [(answer.start, answer.end) for answer in found] == [(5 * a, 5 * b + 4) for (a, b), _ in best]
    assert [answer.score for answer in found] == pytest.approx([score for _, score in best])


def test_all_windows_must_agree_that_there_is_no_answer() -> None:
    offsets = [(0, 1), (2, 3), (4, 5)]
    windows = [make_window(offsets[:2], before=1), make_window(offsets[1:], before=1)]
    logits = [np.zeros((4, 2)), np.zeros((4, 2))]
    logits[0][:2] = [[9.0, 9.0], [1.0, 0.0]]
    logits[1][0] = 0.2
    (answer,) = find_answers("a b c", windows, logits, can_be_empty=True)
    assert (answer.start, answer.end, answer.score) == (0, 1, 1.0)  # the second window gives only 0.4 to no answer
    logits[1][0] = 9.0
    (answer,) = find_answers("a b c", windows, logits, can_be_empty=True)
    assert (answer.start, answer.end, answer.score) == (0, 0, 18.0)
    (answer,) = find_answers("a b c", windows, logits, can_be_empty=True, threshold=20.0)
    assert (answer.start, answer.end) == (0, 1)


def test_fills_are_tokens_of_the_vocabulary() -> None:
    logits = np.array([[0.0, 2.0, 1.0, 50.0]])  # the head has an output more than the vocabulary has tokens
    (fills,) = find_fills(logits, 2, num_tokens=3)
    assert [fill.token_id for fill in fills] == [1, 2]
    assert fills[0].probability == pytest.approx(math.exp(2) / (1 + math.exp(1) + math.exp(2)))


@pytest.mark.parametrize("per_token", [False, True])
def test_documents_are_packed_by_length_and_come_back_in_order(per_token: bool) -> None:
    rng = np.random.default_rng(0)
    documents = [
        Sample(ids := rng.integers(0, 99, rng.integers(1, 900), dtype=np.int32), np.zeros_like(ids)) for _ in range(40)
    ]
    rows: list[int] = []

    def forward(batch: Batch) -> torch.Tensor:
        rows.append(batch.num_tokens)
        ids = batch.input_ids[0].float()
        if per_token:
            return torch.stack((ids, -ids), dim=1)[None]
        bounds = batch.cu_seqlens.tolist()
        return torch.stack([ids[a:b].sum()[None] for a, b in itertools.pairwise(bounds)])

    found = document_logits(forward, documents, "cpu")
    for document, logits in zip(documents, found, strict=True):
        ids = document.input_ids.astype(np.float64)
        assert np.array_equal(logits, np.stack((ids, -ids), axis=1) if per_token else [ids.sum()])
    assert max(rows) <= 4096 and len(rows) < 10
