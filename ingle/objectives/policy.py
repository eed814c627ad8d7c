"""Policy gradients: the loss of sampled answers with their advantages.

Legend: N tokens of the row, M tokens of answers, D documents, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle.adapters import BaseIdentity
from ingle.config.policy import PolicyConfig, Ppo
from ingle.config.policy_presets import suit_policy
from ingle.data.batch import Batch
from ingle.models import Head, Model, forward_hidden, through_head
from ingle.objectives.answers import AnswerTokens, Statistics, describe_targets
from ingle.objectives.interface import Measure, OpenModel, StepModule, Sums, Term
from ingle.objectives.policy_losses import (
    DENOMINATORS,
    Clip,
    PolicyTerms,
    Rows,
    aggregate,
    kl_terms,
    log_ratios,
    policy_losses,
    value_losses,
)
from ingle.objectives.values import Values


class PolicyLoss(StepModule):
    """The loss of a policy, with terms for the divergence from the reference, the entropy and the values.

    It reads these columns of a batch, each at the position of its token: ``advantages``, ``old_logps`` (without it, the
    policy is the one that sampled), ``reference_logps``, ``correction_weights``, ``values``, ``returns``, and
    ``weights``, which is 0 for tokens that do not count.

    Args:
        model: The model that is trained.
        config: The objective.
        values: The value function; None without one.

    Attributes:
        kl_coef: Weight of the divergence in the loss; it may change between steps.
    """

    keeps_dropout = False

    def __init__(self, model: Model, config: PolicyConfig, values: Values | None = None) -> None:
        super().__init__(model)
        self.values = values
        self.config = config = suit_policy(config)
        assert config.clip is not None and config.aggregation is not None and config.kl.coef is not None
        low = math.inf if config.clip_range is None else config.clip_range
        high = low if config.clip_range_high is None else config.clip_range_high
        self._clip = Clip(config.clip, low, high, config.clip_bound or math.inf)
        self._in_loss = config.kl.place == "loss"
        self._has_reference = config.kl.place != "none"
        self.kl_coef = config.kl.coef
        self.measures = (
            Measure("entropy", "answer_tokens"),
            Measure("clip_fraction", "completion_tokens"),
            Measure("clip_fraction_low", "completion_tokens"),
            Measure("clip_fraction_high", "completion_tokens"),
            Measure("ratio_deviation", "completion_tokens"),
            Measure("approx_kl", "completion_tokens"),
            *((Measure("value_clip_fraction", "completion_tokens"),) if values is not None else ()),
        )

    def lr_ratio(self, name: str) -> float:
        """Returns the factor on the learning rate of a parameter; the value function has one of its own."""
        return self.values.lr_ratio if self.values is not None and self.values.owns(name) else 1.0

    def load_parts(self, identity: BaseIdentity | None, open_model: OpenModel) -> None:
        """Loads what the value function begins with."""
        if self.values is not None:
            self.values.load(identity)

    def save_parts(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Saves the value function."""
        if self.values is not None:
            self.values.save(folder / "value", record)

    @property
    def terms(self) -> Sequence[Term]:
        """The loss of the policy, then the divergence, the entropy and the loss of the values."""
        config = self.config
        assert config.aggregation is not None
        terms = [Term("policy_loss", DENOMINATORS[config.aggregation])]
        if self._in_loss:
            unit = "sequences" if config.kl.level == "answer" else DENOMINATORS[config.aggregation]
            terms.append(Term("kl_loss", unit, self.kl_coef))
        if config.entropy_coef:
            terms.append(Term("entropy_bonus", "completion_tokens", -config.entropy_coef))
        if self.values is not None:
            assert isinstance(config, Ppo)
            terms.append(Term("value_loss", "completion_tokens", config.value.coef))
        return terms

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the counted tokens, the answers that have one, the tokens that these could have, and all tokens."""
        tokens = AnswerTokens.of(batch)
        counted = _rows(batch, tokens).counts(self.config.rollout.max_new_tokens)
        return {**counted, "answer_tokens": float(len(tokens.rows))}

    def compute(self, batch: Batch) -> Sums:
        """Returns the sums over the counted tokens."""
        config, tokens = self.config, AnswerTokens.of(batch)
        rows = _rows(batch, tokens)
        found, values_N = self._pass(batch, tokens)
        logps_M = found.logps[tokens.rows]
        old_M = _column(batch, "old_logps", tokens, logps_M.detach())
        assert config.aggregation is not None
        policy = self._compare(logps_M, old_M, batch, tokens)
        nothing = found.logps.sum() * 0.0  # differentiable, whatever the batch has
        losses = {"policy_loss": nothing + aggregate(policy.losses, rows, config.aggregation)}
        if self._in_loss:
            losses["kl_loss"] = nothing + self._divergence(logps_M, old_M, batch, tokens, rows)
        entropies_M = found.entropies[tokens.rows]
        if config.entropy_coef:
            losses["entropy_bonus"] = nothing + rows.sums(entropies_M).sum()
        distance_M = logps_M.detach() - old_M
        figures = {
            "clip_fraction": (policy.low | policy.high).to(logps_M.dtype),
            "clip_fraction_low": policy.low.to(logps_M.dtype),
            "clip_fraction_high": policy.high.to(logps_M.dtype),
            "ratio_deviation": torch.expm1(distance_M).abs(),
            "approx_kl": torch.expm1(distance_M) - distance_M,
        }
        if values_N is not None:
            assert isinstance(config, Ppo)
            bound = config.value.clip_range
            before_M, returns_M = (_column(batch, name, tokens) for name in ("values", "returns"))
            value_M, bounded_M = value_losses(values_N[tokens.rows], before_M, returns_M, bound)
            losses["value_loss"] = nothing + values_N.sum() * 0.0 + aggregate(value_M, rows, "tokens")
            figures["value_clip_fraction"] = bounded_M.to(logps_M.dtype)
        measured = {name: rows.sums(values_M).sum() for name, values_M in figures.items()}
        return Sums(losses, {"entropy": entropies_M.detach().sum(), **measured})

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``logps``, ``entropies`` and, with a value function, ``values`` of each token of the answers, [M].

        They come from the same code as those of the loss, so that the ratio of the first update is exactly 1. Without
        gradients, inside :func:`ingle.parallel.call_outside_step`.
        """
        tokens = AnswerTokens.of(batch)
        found, values_N = self._pass(batch, tokens)
        columns = {"logps": found.logps, "entropies": found.entropies}
        if values_N is not None:
            columns["values"] = values_N
        return {name: values_N[tokens.rows] for name, values_N in columns.items()}

    def reference_logps(self, batch: Batch) -> Tensor:
        """Returns the log-probability of each token of the answers, [M], under whatever the model computes now."""
        tokens = AnswerTokens.of(batch)
        return self._describe(forward_hidden(self.model, batch)[0], tokens).logps[tokens.rows]

    def _pass(self, batch: Batch, tokens: AnswerTokens) -> tuple[Statistics, Tensor | None]:
        """Returns the figures of each target, and the value before it."""
        hidden_NH = forward_hidden(self.model, batch)[0]
        return self._describe(hidden_NH, tokens), None if self.values is None else self.values(batch, hidden_NH)

    def _describe(self, hidden_NH: Tensor, tokens: AnswerTokens) -> Statistics:
        function = partial(
            _at_temperature,
            temperature=self.config.rollout.temperature,
            with_entropies=self.config.entropy_coef > 0,
        )
        return Statistics(*through_head(self.model, function, hidden_NH, tokens.targets))

    def _compare(self, logps_M: Tensor, old_M: Tensor, batch: Batch, tokens: AnswerTokens) -> PolicyTerms:
        """Returns the loss of each token of the answers, whether it counts or not."""
        assert self.config.importance is not None
        everything = Rows(torch.ones_like(tokens.rows, dtype=torch.bool), tokens.documents, len(tokens.lengths))
        ratios_M = log_ratios(logps_M, old_M, everything, self.config.importance)
        policy = policy_losses(logps_M, ratios_M, _column(batch, "advantages", tokens), self._clip)
        losses_M = self._once(policy.losses, tokens)
        if "correction_weights" in batch.columns:
            losses_M = losses_M * _column(batch, "correction_weights", tokens)
        return policy._replace(losses=losses_M)

    def _once(self, losses_M: Tensor, tokens: AnswerTokens) -> Tensor:
        """Returns losses whose sum over an answer is that of the answer, if its tokens have one ratio (RLOO).

        Each token then has the value of the answer, but its own gradient: only the value is divided by the length.
        """
        if self.config.importance != "sequence" or self.config.aggregation != "answer_sums":
            return losses_M
        return losses_M - losses_M.detach() * (1 - 1 / tokens.lengths[tokens.documents])

    def _divergence(self, logps_M: Tensor, old_M: Tensor, batch: Batch, tokens: AnswerTokens, rows: Rows) -> Tensor:
        config = self.config
        assert config.kl.estimator is not None and config.aggregation is not None
        reference_M = _column(batch, "reference_logps", tokens)
        if config.kl.level == "answer":
            return (rows.sums(reference_M - logps_M) ** 2 / 2).sum()
        return aggregate(kl_terms(logps_M, reference_M, config.kl.estimator, old_M), rows, config.aggregation)

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss of the policy in each answer and its denominator, float64 [answers, 2]."""
        config, tokens = self.config, AnswerTokens.of(batch)
        assert config.aggregation is not None
        rows = _rows(batch, tokens)
        logps_M = self.reference_logps(batch)
        sums_D = rows.sums(self._compare(logps_M, _column(batch, "old_logps", tokens, logps_M), batch, tokens).losses)
        lengths_D = rows.lengths(sums_D)
        if config.aggregation == "answers":
            sums_D = sums_D / lengths_D.clamp_min(1)
        unit = {"completion_tokens": lengths_D, "sequences": (lengths_D > 0).double()}
        unit["slots"] = unit["sequences"] * config.rollout.max_new_tokens
        return torch.stack([sums_D.double(), unit[self.terms[0].denominator].double()], 1)[batch.answers()]

    def log_ratios(self, batch: Batch) -> Tensor | None:
        """Returns the log-ratio of each token to the reference, [M]; None without a reference."""
        if not self._has_reference or "reference_logps" not in batch.columns:
            return None
        return self.reference_logps(batch) - _column(batch, "reference_logps", AnswerTokens.of(batch))

    def start_sums(self, batch: Batch) -> Mapping[str, float]:
        """Returns the loss of the policy where all ratios are 1: minus the advantages."""
        if self._clip.kind == "cispo":
            return {}
        tokens = AnswerTokens.of(batch)
        losses_M = self._once(-_column(batch, "advantages", tokens), tokens)
        if "correction_weights" in batch.columns:
            losses_M = losses_M * _column(batch, "correction_weights", tokens)
        assert self.config.aggregation is not None
        return {"policy_loss": float(aggregate(losses_M, _rows(batch, tokens), self.config.aggregation))}

    def largest_deviation(self, batch: Batch) -> float:
        """Returns the largest distance of an importance ratio from 1; exactly 0 before the first update."""
        tokens = AnswerTokens.of(batch)
        logps_M = self.evaluate(batch)["logps"]
        deviations_M = torch.expm1(logps_M - _column(batch, "old_logps", tokens, logps_M)).abs()
        return float(deviations_M.max()) if len(deviations_M) else 0.0


def _rows(batch: Batch, tokens: AnswerTokens) -> Rows:
    """Returns the answers of a batch; those of its tokens count whose weight is not 0."""
    counted_M = torch.ones_like(tokens.rows, dtype=torch.bool)
    if "weights" in batch.columns:
        counted_M = _column(batch, "weights", tokens) > 0
    return Rows(counted_M, tokens.documents, len(tokens.lengths))


def _column(batch: Batch, name: str, tokens: AnswerTokens, default_M: Tensor | None = None) -> Tensor:
    """Returns a column at the tokens of answers, [M]; it lies at the position of each token."""
    if name not in batch.columns and default_M is not None:
        return default_M
    return batch.columns[name][0].roll(-1)[tokens.rows]


def _at_temperature(
    output: Head, hidden_NH: Tensor, targets_N: Tensor, *, temperature: float, with_entropies: bool
) -> Tensor:
    """Returns :class:`Statistics` at the sampling temperature as one tensor, [3, N]."""
    softcap = None if output.softcap is None else output.softcap / temperature
    scaled = replace(output, logit_scale=output.logit_scale / temperature, softcap=softcap)
    return describe_targets(scaled, hidden_NH, targets_N, with_entropies=with_entropies)
