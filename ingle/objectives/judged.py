"""Judged answers: losses of single answers that are good or bad, relative to a reference.

Legend: D documents, A answers of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle.config.preferences import JudgedConfig, Kto
from ingle.config.presets import suit_preferences
from ingle.data.batch import Batch
from ingle.errors import ConfigError
from ingle.models import Model
from ingle.objectives.answers import AnswerTokens, answer_logps, log_ratios
from ingle.objectives.interface import Measure, StepModule, Sums, Term
from ingle.objectives.pair_losses import judged_loss

#: Answers with a higher score are good.
GOOD = 0.5


def class_weights(config: JudgedConfig, scores_D: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Returns the weights of good and of bad answers.

    Args:
        config: The objective.
        scores_D: The scores of all answers of the training data.

    Raises:
        ConfigError: All answers are good, or all are bad.
    """
    num_good = int((scores_D > GOOD).sum())
    num_bad = len(scores_D) - num_good
    if not num_good or not num_bad:
        raise ConfigError(
            f"All answers of the training data are {'good' if num_good else 'bad'}.",
            where="data.sources",
            why=f"{config.kind} learns from the difference between good and bad answers",
            fix="add rows of the other label, or use --objective.kind=sft" if num_good else "add rows of good answers",
        )
    good, bad = config.desirable_weight, config.undesirable_weight
    if good == "auto" and bad == "auto":
        return max(1.0, num_bad / num_good), max(1.0, num_good / num_bad)
    if good == "auto":
        good = float(bad) * num_bad / num_good
    if bad == "auto":
        bad = good * num_good / num_bad
    return good, bad


class _Found(NamedTuple):
    """The answers of a micro-batch that have tokens, [A]."""

    documents: Tensor
    is_good: Tensor
    lengths: Tensor
    logps: Tensor
    rewards: Tensor
    losses: Tensor


class JudgedLoss(StepModule):
    """Weighted losses of good and bad answers, averaged over all answers.

    Args:
        model: The model that is trained.
        config: The objective.
        weights: The weights of good and of bad answers.
    """

    keeps_dropout = False
    measures = (
        Measure("rewards/chosen", "good_answers"),
        Measure("rewards/rejected", "bad_answers"),
        Measure("logps/chosen", "good_answers"),
        Measure("logps/rejected", "bad_answers"),
        Measure("response_tokens", "answers"),
    )
    row_measures = ("rewards/chosen", "rewards/rejected")
    terms: Sequence[Term] = (Term("preference", "answers"),)

    def __init__(self, model: Model, config: JudgedConfig, weights: tuple[float, float]) -> None:
        super().__init__(model)
        beta = suit_preferences(config).beta
        assert beta is not None
        self._beta, self._weights = beta, weights
        self._loss = config.loss if isinstance(config, Kto) else config.kind

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the answers with tokens, and those of each class."""
        documents = _answers(batch, AnswerTokens.of(batch))
        num_good = float((batch.columns["scores"][documents] > GOOD).sum())
        return {"answers": float(len(documents)), "good_answers": num_good, "bad_answers": len(documents) - num_good}

    def compute(self, batch: Batch) -> Sums:
        """Returns the sum over all answers."""
        tokens = AnswerTokens.of(batch)
        logps_N = answer_logps(self.model, batch, tokens.targets)
        found = self._judge(logps_N, batch, tokens)
        metrics = {"response_tokens": found.lengths.sum().float()}
        for name, is_own in (("chosen", found.is_good), ("rejected", ~found.is_good)):
            metrics[f"rewards/{name}"] = found.rewards[is_own].sum()
            metrics[f"logps/{name}"] = found.logps[is_own].sum()
        return Sums({"preference": logps_N.sum() * 0.0 + found.losses.sum()}, metrics)

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss and the reward of each answer, and their counts; float64 [answers, 6]."""
        tokens = AnswerTokens.of(batch)
        found = self._judge(answer_logps(self.model, batch, tokens.targets), batch, tokens)
        good_A, one_A = found.is_good.double(), torch.ones_like(found.losses)
        columns = (found.losses, one_A, found.rewards * good_A, good_A, found.rewards * (1 - good_A), 1 - good_A)
        table_DC = torch.zeros(len(tokens.lengths), len(columns), dtype=torch.float64)
        table_DC[found.documents.cpu()] = torch.stack([column.double() for column in columns], 1).cpu()
        return table_DC[batch.answers().cpu()]

    def log_ratios(self, batch: Batch) -> Tensor:
        """Returns the log-ratio of every supervised token, [M]."""
        tokens = AnswerTokens.of(batch)
        return log_ratios(answer_logps(self.model, batch, tokens.targets)[tokens.rows], batch, tokens)

    def start_sums(self, batch: Batch) -> Mapping[str, float]:
        """Returns the loss of answers whose log-ratios are 0."""
        documents = _answers(batch, AnswerTokens.of(batch))
        losses_A = self._losses(torch.zeros(len(documents), dtype=torch.float64), documents, batch)
        return {"preference": float(losses_A.sum())}

    def _judge(self, logps_N: Tensor, batch: Batch, tokens: AnswerTokens) -> _Found:
        logps_M = logps_N[tokens.rows]
        documents = _answers(batch, tokens)
        ratios_A = tokens.by_document(log_ratios(logps_M, batch, tokens)).sum(1)[documents]
        logps_A = tokens.by_document(logps_M.detach()).sum(1)[documents]
        is_good_A = batch.columns["scores"][documents] > GOOD
        losses_A = self._losses(ratios_A, documents, batch)
        rewards_A = self._beta * ratios_A.detach()
        return _Found(documents, is_good_A, tokens.lengths[documents], logps_A, rewards_A, losses_A)

    def _losses(self, ratios_A: Tensor, documents: Tensor, batch: Batch) -> Tensor:
        """Returns the weighted loss of each answer, [A]."""
        is_good_A = (batch.columns["scores"][documents] > GOOD).to(ratios_A.device)
        baselines = batch.columns.get("baselines")
        baselines_A = torch.zeros_like(ratios_A) if baselines is None else baselines[documents].to(ratios_A)
        good, bad = self._weights
        weights_A = torch.where(is_good_A, good, bad).to(ratios_A.dtype)
        return weights_A * judged_loss(ratios_A, is_good_A, baselines_A, self._beta, self._loss)


def _answers(batch: Batch, tokens: AnswerTokens) -> Tensor:
    """Returns the answers that have tokens, int64 [A]."""
    documents = batch.answers()
    return documents[tokens.lengths[documents] > 0]
