"""Losses of pairs over packed documents: TRL's values, the choice of pairs, and documents that count for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ingle.config.objective import ObjectiveConfig
from ingle.config.preferences import Kto
from ingle.data.batch import Batch, collate, round_up
from ingle.data.shared_prompts import share
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.errors import ConfigError
from ingle.objectives.answers import AnswerTokens, Statistics, find_pairs, log_ratios, with_reference
from ingle.objectives.judged import JudgedLoss, class_weights
from ingle.objectives.pairs import PairLoss

_TRL = json.loads((Path(__file__).parents[2] / "oracles" / "trl-1.16.json").read_text())
_PROMPT = 3


def section(**options: Any) -> Any:
    return TypeAdapter(ObjectiveConfig).validate_python(options)


def make_batch(lengths: list[tuple[int, ...]], scores: list[tuple[float, ...]], *, shares: bool = False) -> Batch:
    """Rows of answers of given lengths behind a prompt."""
    samples = []
    for row, (answers, values) in enumerate(zip(lengths, scores, strict=True)):
        for number, (length, value) in enumerate(zip(answers, values, strict=True)):
            ids = np.concatenate([np.arange(_PROMPT) + row, 50 + 10 * number + np.arange(length)]).astype(np.int32)
            labels = np.where(np.arange(len(ids)) < _PROMPT, IGNORE_INDEX, ids).astype(np.int32)
            columns = {"scores": np.float32([value]), "group_ids": np.int64([row])}
            samples.append(Sample(ids, labels, columns))
    return collate(share(samples, at_least=1) if shares else samples)


def spread(rows: list[list[float]], lengths: tuple[int, ...], tokens: AnswerTokens, start: int) -> Tensor:
    """Puts the values of answers where their tokens are predicted, [N]."""
    values = torch.zeros(len(tokens.targets))
    flat = [value for row, length in zip(rows, lengths, strict=True) for value in row[:length]]
    values[tokens.rows[start : start + len(flat)]] = torch.tensor(flat)
    return values


def figures(batch: Batch, tokens: AnswerTokens) -> tuple[Statistics, Batch]:
    """The figures of TRL's pairs, and the batch with their reference."""
    columns: dict[str, Tensor] = {}
    for name in ("logps", "reference", "log_squares"):
        total, start = torch.zeros(len(tokens.targets)), 0
        for pair in _TRL["pairs"]:
            total += spread(pair[name], pair["lengths"], tokens, start)
            start += sum(pair["lengths"])
        columns[name] = total
    added = with_reference(columns["reference"], batch)
    prepared = Batch({**batch.columns, **added}, batch.num_tokens, batch.num_documents, batch.num_supervised)
    found = Statistics(columns["logps"].requires_grad_(), torch.zeros(len(tokens.targets)), columns["log_squares"])
    return found, prepared


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("golden", _TRL["losses"], ids=lambda golden: "-".join(map(str, golden["objective"].values())))
def test_losses_and_gradients_are_those_of_trl(golden: dict[str, Any], shares: bool) -> None:
    lengths = [tuple(pair["lengths"]) for pair in _TRL["pairs"]]
    batch = round_up(make_batch(lengths, [(1.0, 0.0)] * len(lengths), shares=shares))
    tokens = AnswerTokens.of(batch)
    found, prepared = figures(batch, tokens)
    options = {"beta": 0.1} | golden["objective"]
    module = PairLoss(nn.Module(), section(**options))
    pairs = find_pairs(batch, tokens.lengths > 0, "all")
    losses, _, _ = module.compare(found, prepared, tokens, pairs)
    torch.testing.assert_close(losses, torch.tensor(golden["values"]), rtol=2e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), found.logps)
    start = 0
    for own, length in zip(golden["gradients"], lengths, strict=True):
        expected = spread(own, length, tokens, start)
        rows = tokens.rows[start : start + sum(length)]
        torch.testing.assert_close(gradient[rows], expected[rows], rtol=2e-5, atol=1e-6)
        start += sum(length)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", {(2, 0), (2, 1), (2, 3), (0, 1), (3, 1)}),
        ("best_worst", {(2, 1)}),
        ("neighbours", {(2, 0), (3, 1)}),
    ],
)
def test_pairs_of_a_row_of_scored_answers(choice: Any, expected: set[tuple[int, int]]) -> None:
    batch = make_batch([(2, 3, 4, 2), (2, 2), (3, 1)], [(0.5, 0.1, 0.9, 0.5), (1.0, 1.0), (0.0, 1.0)])
    found = find_pairs(batch, torch.ones(8, dtype=torch.bool), choice)
    pairs = list(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True))
    assert set(pairs) == expected | {(7, 6)} and len(pairs) == len(expected) + 1  # the second row has a tie
    assert found.weights.sum() == pytest.approx(2) and found.best.tolist() == [2, 7]


def test_an_answer_without_tokens_makes_no_pair_and_a_batch_without_pairs_counts_for_nothing() -> None:
    batch = make_batch([(2, 0)], [(1.0, 0.0)])
    tokens = AnswerTokens.of(batch)
    found = Statistics(torch.zeros(len(tokens.targets), requires_grad=True), *[torch.zeros(len(tokens.targets))] * 2)
    module = PairLoss(nn.Module(), section(kind="simpo"))
    pairs = find_pairs(batch, tokens.lengths > 0, "all")
    losses, measures, _ = module.compare(found, batch, tokens, pairs)
    assert losses.shape == (0,) and all(value.shape == (0,) for value in measures.values())
    assert module.counts(batch) == {"pairs": 0, "chosen_tokens": 0, "answers": 1, "answer_tokens": 2}


def test_the_reference_stays_with_its_tokens_when_memory_splits_a_batch() -> None:
    batch = make_batch([(2, 3), (4, 1)], [(1.0, 0.0)] * 2, shares=True)
    tokens = AnswerTokens.of(batch)
    logps = torch.where(tokens.targets != IGNORE_INDEX, -torch.rand(len(tokens.targets)), 0.0)
    whole = Batch({**batch.columns, **with_reference(logps, batch)}, batch.num_tokens, batch.num_documents, 10)
    rest = logps[tokens.rows].tolist()
    for part in whole.split(2):
        own = AnswerTokens.of(part)
        expected = torch.tensor([rest.pop(0) for _ in own.rows])
        torch.testing.assert_close(log_ratios(torch.zeros(len(own.rows)), part, own), -expected)
    assert not rest


def test_the_rarer_class_of_judged_answers_weighs_more() -> None:
    scores = np.float32([1, 1, 1, 0])
    kto = Kto(kind="kto")
    assert class_weights(kto, scores) == (1, 3)
    assert class_weights(kto.model_copy(update={"undesirable_weight": 1.5}), scores) == (0.5, 1.5)
    assert class_weights(kto.model_copy(update={"desirable_weight": 2.0}), scores) == (2, 6)
    with pytest.raises(ConfigError, match="are good"):
        class_weights(kto, scores[:3])


def test_judged_losses_start_at_half_of_their_weight() -> None:
    batch = make_batch([(2,), (3,), (0,)], [(1.0,), (0.0,), (1.0,)])
    module = JudgedLoss(nn.Module(), Kto(kind="kto"), (1.0, 3.0))
    assert module.start_sums(batch) == {"preference": 2.0}
    assert module.counts(batch) == {"answers": 2, "good_answers": 1, "bad_answers": 1}
