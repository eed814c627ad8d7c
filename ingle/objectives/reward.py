"""Reward models: a head that scores answers, trained on pairs of them.

Legend: D documents, A answers, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ingle.config.preferences import Reward
from ingle.data.batch import Batch
from ingle.models import Model, ModelTask, forward_reward, task_of
from ingle.objectives.answers import Pairs, find_pairs
from ingle.objectives.interface import Measure, StepModule, Sums, Term
from ingle.objectives.pair_losses import reward_loss
from ingle.parallel import copy_rows


@torch.no_grad()
def start_scores(model: Model, stored: ModelTask, seed: int) -> None:
    """Draws the weights of a causal model's head from N(0, 1 / (H + 1)), unless its checkpoint has such a head.

    Other models keep what their architecture draws. All ranks call it together.

    Args:
        model: A model that scores, with its weights loaded.
        stored: What the head of its checkpoint predicts.
        seed: Seed of the run.

    Source: Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031), detail 11.
    """
    layer = getattr(model, "score", None)
    if stored == task_of(model) or not isinstance(layer, nn.Linear):
        return
    drawn = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(seed))
    copy_rows(layer.weight, drawn / math.sqrt(layer.in_features + 1))


class RewardLoss(StepModule):
    """``-log sigmoid`` of the difference of the scores of each pair, and their squared sum.

    Args:
        model: A model that scores.
        config: The objective.
    """

    measures = tuple(Measure(f"rewards/{name}", "pairs") for name in ("chosen", "rejected", "margin", "accuracy"))
    row_measures = ("rewards/accuracy", "rewards/margin")

    def __init__(self, model: Model, config: Reward) -> None:
        super().__init__(model)
        self._config = config
        if not config.centering:  # the bias of the head cancels in a difference of scores
            trained = [(name, each.shape) for name, each in model.named_parameters() if each.requires_grad]
            self.idle = tuple(name for name, shape in trained if name.endswith(".bias") and shape == (1,))

    @property
    def terms(self) -> Sequence[Term]:
        """The loss of pairs, and what keeps scores near 0."""
        centering = self._config.centering
        return (Term("preference", "pairs"), *([Term("centering", "pairs", centering)] if centering else []))

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the rows with a pair."""
        return {"pairs": float(len(self._pairs(batch).best))}

    def compute(self, batch: Batch) -> Sums:
        """Returns the sums over pairs, weighted so that every row counts once."""
        scores_D, nothing = self._scores(batch)
        pairs = self._pairs(batch)
        losses_P, figures = self._compare(scores_D, pairs)
        losses = {"preference": nothing + (losses_P * pairs.weights).sum()}
        if self._config.centering:
            # Source: Eisenstein et al. 2023 (arXiv 2312.09244), section 2.
            both_P = scores_D[pairs.chosen] + scores_D[pairs.rejected]
            losses["centering"] = nothing + (both_P**2 * pairs.weights).sum()
        return Sums(losses, {name: (value * pairs.weights).sum() for name, value in figures.items()})

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss, the accuracy and the margin of each row with one of its answers; float64 [answers, 6]."""
        scores_D, _ = self._scores(batch)
        pairs = self._pairs(batch)
        losses_P, figures = self._compare(scores_D, pairs)
        columns = [losses_P, *(figures[name] for name in self.row_measures)]
        table_PC = torch.stack([each for column in columns for each in (column, torch.ones_like(column))], 1)
        table_PC = table_PC.double().cpu() * pairs.weights.double().cpu()[:, None]
        table_DC = torch.zeros(len(scores_D), table_PC.shape[1], dtype=torch.float64)
        return table_DC.index_add_(0, pairs.chosen.cpu(), table_PC)[batch.answers().cpu()]

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the score of each document, 0 of those that are no answer, [D], and a differentiable 0."""
        scores_A = forward_reward(self.model, batch)
        nothing = scores_A.sum() * 0.0
        answers = batch.answers()
        scores_D = scores_A.new_zeros(len(batch.cu_seqlens) - 1)
        return scores_D.index_put((answers,), scores_A[: len(answers)]), nothing

    def _pairs(self, batch: Batch) -> Pairs:
        everything = torch.ones(len(batch.cu_seqlens) - 1, dtype=torch.bool)
        return find_pairs(batch, everything, self._config.pairs)

    def _compare(self, scores_D: Tensor, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of each pair and its measures, [P]."""
        chosen, rejected = scores_D[pairs.chosen], scores_D[pairs.rejected]
        margins = pairs.margins * self._config.margin_scale if self._config.margin == "scores" else chosen.new_zeros(())
        figures = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margin": (chosen - rejected).detach(),
            "rewards/accuracy": (chosen > rejected).to(chosen.dtype),
        }
        return reward_loss(chosen, rejected, margins), figures
