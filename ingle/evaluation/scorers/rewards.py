"""The rewards of answers as a metric."""

from __future__ import annotations

import numpy as np

from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, ratio_scores
from ingle.report.metrics import METRICS


class Reward(Scorer):
    """Mean of the rewards of all answers that have one."""

    metric = METRICS["reward"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores each answer by the sum of its rewards, which the runner has collected."""
        rewards = np.array(outputs.rewards, np.float64)
        known = ~np.isnan(rewards)
        statistics = np.stack((np.where(known, rewards, 0.0), known), axis=1)
        return ratio_scores(self, statistics.astype(np.float64), "reward:sum")
