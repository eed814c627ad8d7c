"""Preferences: losses of the log-probabilities of pairs of answers.

Legend: N tokens of the row of targets, M supervised tokens, D documents, T tokens of the longest answer, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ingle.config.preferences import Cpo, Dpo, Orpo, Simpo
from ingle.config.presets import suit_preferences
from ingle.data.batch import Batch
from ingle.errors import ConfigError
from ingle.models import Model
from ingle.objectives.answers import (
    AnswerTokens,
    Pairs,
    Statistics,
    answer_divergences,
    answer_logps,
    answer_statistics,
    find_pairs,
    log_ratios,
    reference_states,
)
from ingle.objectives.interface import Measure, StepModule, Sums, Term
from ingle.objectives.pair_losses import Answers, PairOptions, pair_loss, rewards, start_value

PreferenceConfig = Dpo | Simpo | Cpo | Orpo


def pair_options(config: PreferenceConfig) -> PairOptions:
    """Returns what the loss of an objective reads, with published values for options that are null."""
    config = suit_preferences(config)
    assert config.beta is not None
    match config:
        case Dpo():
            return PairOptions(
                config.loss,
                config.beta,
                label_smoothing=config.label_smoothing or 0.0,
                divergence=config.divergence,
                divergence_alpha=config.divergence_alpha,
                penalty=config.penalty or 0.0,
                kl_weight=config.kl_weight or 0.0,
                temperature=config.temperature or 1.0,
            )
        case Simpo():
            gamma = config.gamma or 0.0
            return PairOptions("simpo", config.beta, config.label_smoothing, gamma=gamma, alpha=config.alpha)
        case Cpo(loss="hinge"):
            return PairOptions("cpo_hinge", config.beta)
        case Cpo(loss="ipo"):
            return PairOptions("cpo_ipo", config.beta)
        case Cpo():
            return PairOptions("cpo", config.beta, config.label_smoothing)
        case Orpo():
            return PairOptions("orpo", config.beta)


class PairLoss(StepModule):
    """The loss of pairs of answers, and the cross-entropy of the best answer of each row.

    Args:
        model: The model that is trained.
        config: The objective.
        is_sampled: Whether the model itself has sampled the answers. Their log-ratios then measure ``kl``, the
            divergence from the reference in nats per answer.

    Raises:
        ConfigError: The loss compares distributions with those of the reference, and the output layer is trained.
    """

    measures = (
        *(Measure(f"rewards/{name}", "pairs") for name in ("chosen", "rejected", "margin", "accuracy")),
        *(Measure(f"logps/{name}", "pairs") for name in ("chosen", "rejected")),
        Measure("response_tokens", "answers"),
        Measure("entropy", "answer_tokens"),
    )
    row_measures = ("rewards/accuracy", "rewards/margin", "logps/chosen")

    def __init__(self, model: Model, config: PreferenceConfig, *, is_sampled: bool = False) -> None:
        self.keeps_dropout = not isinstance(config, Dpo)
        super().__init__(model)
        self.options = pair_options(config)
        self._start = start_value(self.options)
        self.reads_states = self.options.loss in ("tdpo1", "tdpo2")
        if self.reads_states and any(p.requires_grad for p in model.get_output_embeddings().parameters()):
            raise ConfigError(
                "The loss compares distributions of the model and its reference, which share the output layer.",
                where=f"objective.loss = {self.options.loss}, adapter.trainable_modules",
                fix="leave the output layer out of adapter.trainable_modules",
            )
        self._is_sampled = is_sampled
        if is_sampled:
            self.measures = (*PairLoss.measures, Measure("kl", "answers"))
        self._choice = config.pairs
        self._weights_pairs = isinstance(config, Dpo) and config.weighting == "wpo"
        self._tail_weight = config.tail_weight if isinstance(config, Dpo) else 1.0
        self._sft_weight = 1.0 if isinstance(config, Orpo) else suit_preferences(config).sft_weight or 0.0

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with its reference."""
        return self._start is not None

    @property
    def terms(self) -> Sequence[Term]:
        """The loss of pairs, and of the tokens of the best answers."""
        sft = [Term("sft_loss", "chosen_tokens", self._sft_weight)] if self._sft_weight else []
        return (Term("preference", "pairs"), *sft)

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the rows with a pair, the tokens of their best answers, and the answers."""
        tokens = AnswerTokens.of(batch)
        pairs = self._pairs(batch, tokens)
        return {
            "pairs": float(len(pairs.best)),
            "chosen_tokens": float(tokens.lengths[pairs.best].sum()),
            "answers": float((tokens.lengths[batch.answers()] > 0).sum()),
            "answer_tokens": float(len(tokens.rows)),
        }

    def compute(self, batch: Batch) -> Sums:
        """Returns the sums over pairs, weighted so that every row counts once, and over tokens."""
        tokens = AnswerTokens.of(batch)
        (found, divergences_N), pairs = self._describe(batch, tokens), self._pairs(batch, tokens)
        losses_P, figures, logps_D = self.compare(found, batch, tokens, pairs, divergences_N)
        nothing = found.logps.sum() * 0.0  # differentiable, whatever the batch has
        losses = {"preference": nothing + (losses_P * pairs.weights).sum()}
        if self._sft_weight:
            losses["sft_loss"] = nothing - logps_D[pairs.best].sum()
        metrics = {name: (value * pairs.weights).sum() for name, value in figures.items()}
        metrics["response_tokens"] = tokens.lengths[batch.answers()].sum().float()
        metrics["entropy"] = found.entropies.sum()
        if self._is_sampled:
            metrics["kl"] = log_ratios(found.logps.detach()[tokens.rows], batch, tokens).sum()
        return Sums(losses, metrics)

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss of each row and some of its measures with one of its answers; float64 [answers, 8]."""
        tokens = AnswerTokens.of(batch)
        (found, divergences_N), pairs = self._describe(batch, tokens), self._pairs(batch, tokens)
        losses_P, figures, _ = self.compare(found, batch, tokens, pairs, divergences_N)
        columns = [losses_P, *(figures[name] for name in self.row_measures)]
        weights_P = pairs.weights.double().cpu()
        table_PC = torch.stack([each for column in columns for each in (column, torch.ones_like(column))], 1)
        # On the CPU, since a GPU adds in no fixed order.
        table_DC = torch.zeros(len(tokens.lengths), table_PC.shape[1], dtype=torch.float64)
        table_DC.index_add_(0, pairs.chosen.cpu(), table_PC.double().cpu() * weights_P[:, None])
        return table_DC[batch.answers().cpu()]

    def log_ratios(self, batch: Batch) -> Tensor | None:
        """Returns the log-ratio of every supervised token, [M]; None for a loss without a reference."""
        if not self.has_reference:
            return None
        tokens = AnswerTokens.of(batch)
        return log_ratios(answer_logps(self.model, batch, tokens.targets)[tokens.rows], batch, tokens)

    def start_sums(self, batch: Batch) -> Mapping[str, float]:
        """Returns the loss of pairs whose log-ratios are 0."""
        return (
            {}
            if self._start is None or self._weights_pairs
            else {"preference": self._start * self.counts(batch)["pairs"]}
        )

    def _pairs(self, batch: Batch, tokens: AnswerTokens) -> Pairs:
        return find_pairs(batch, tokens.lengths > 0, self._choice)

    def _describe(self, batch: Batch, tokens: AnswerTokens) -> tuple[Statistics, Tensor | None]:
        if not self.reads_states:
            return answer_statistics(self.model, batch, tokens.targets), None
        return answer_divergences(self.model, batch, tokens.targets, reference_states(batch))

    def compare(
        self,
        found: Statistics,
        batch: Batch,
        tokens: AnswerTokens,
        pairs: Pairs,
        divergences_N: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns the loss of each pair [P], its measures [P], and the log-probability of each document [D].

        Args:
            found: Figures of the tokens.
            batch: With the log-probabilities of the reference, if the loss has one.
            tokens: The supervised tokens of the batch.
            pairs: Its pairs.
            divergences_N: Divergences of the reference from the model, for losses that read them.
        """
        logps_M = found.logps[tokens.rows]
        logps_DT = tokens.by_document(logps_M)
        ratios_DT = tokens.by_document(log_ratios(logps_M, batch, tokens)) if self.has_reference else None
        totals_D = None if divergences_N is None else tokens.by_document(divergences_N[tokens.rows]).sum(1)
        shorter_P = torch.minimum(tokens.lengths[pairs.chosen], tokens.lengths[pairs.rejected])
        sides = [
            Answers(
                self._sums(logps_DT[documents], shorter_P),
                tokens.lengths[documents].to(logps_DT.dtype),
                None if ratios_DT is None else self._sums(ratios_DT[documents], shorter_P),
                None if totals_D is None else totals_D[documents],
            )
            for documents in (pairs.chosen, pairs.rejected)
        ]
        logps_D = logps_DT.sum(1)
        of_chosen, of_rejected = (rewards(side, self.options) for side in sides)
        figures = {
            "rewards/chosen": of_chosen,
            "rewards/rejected": of_rejected,
            "rewards/margin": of_chosen - of_rejected,
            "rewards/accuracy": (of_chosen > of_rejected).to(of_chosen.dtype),
            "logps/chosen": logps_D[pairs.chosen].detach(),
            "logps/rejected": logps_D[pairs.rejected].detach(),
        }
        losses_P = pair_loss(sides[0], sides[1], self.options)
        if self._weights_pairs:
            losses_P = losses_P * self._weights(found, tokens, pairs)
        return losses_P, figures, logps_D

    def _weights(self, found: Statistics, tokens: AnswerTokens, pairs: Pairs) -> Tensor:
        """Returns how likely the model itself would give both answers of each pair, [P], detached.

        Source: Zhou et al. 2024, "WPO" (arXiv 2406.11827), equation 2 with sampled alignment.
        """
        aligned_M = (found.logps.detach() - found.log_squares)[tokens.rows]
        means_D = tokens.by_document(aligned_M).sum(1) / tokens.lengths.clamp_min(1)
        return (means_D[pairs.chosen] + means_D[pairs.rejected]).exp()

    def _sums(self, values_PT: Tensor, shorter_P: Tensor) -> Tensor:
        """Returns the sum over each answer, [P]; tokens beyond the length of the shorter answer have their own weight.

        Source: Liu et al. 2024, "LD-DPO" (arXiv 2409.06411), equation 10.
        """
        if self._tail_weight == 1:
            return values_PT.sum(1)
        is_tail_PT = torch.arange(values_PT.shape[1], device=values_PT.device) >= shorter_P[:, None]
        return torch.where(is_tail_PT, values_PT * self._tail_weight, values_PT).sum(1)
