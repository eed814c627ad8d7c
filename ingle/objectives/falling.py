"""Notices that the chosen answers become less likely, although they win against the rejected ones."""

from __future__ import annotations

from collections import deque
from statistics import fmean, stdev

#: Steps whose mean counts, and the fall in nats from which on it is said.
_NUM_STEPS, _LEAST_NATS = 20, 1.0


class Falling:
    """Watches the log-ratio of the chosen answers to the reference.

    A preference loss only compares two answers, so both may become less likely, and text that is in neither of them
    more likely.

    Source: Pal et al. 2024, "DPOP" (arXiv 2402.13228), section 3; Razin et al. 2024, "Unintentional unalignment" (arXiv
    2410.08847).
    """

    def __init__(self) -> None:
        self._log_ratios = deque[float](maxlen=_NUM_STEPS)
        self._is_said = False

    def update(self, log_ratio: float) -> None:
        """Adds a step: the mean log-ratio of its chosen answers, in nats."""
        self._log_ratios.append(log_ratio)

    def hint(self) -> str | None:
        """Returns what to say of the latest steps; None if there is nothing, or it has been said."""
        if self._is_said or len(self._log_ratios) < _NUM_STEPS:
            return None
        mean, error = fmean(self._log_ratios), stdev(self._log_ratios) / _NUM_STEPS**0.5
        if mean > -_LEAST_NATS or mean + 2 * error > 0:
            return None
        self._is_said = True
        return (
            f"The chosen answers become less likely: by {-mean:.1f} nats against the reference in the last "
            f"{_NUM_STEPS} steps. They may still win, but text that is in neither answer becomes more likely. Add "
            "--objective.sft_weight=1, try --objective.loss=dpop, or use a smaller --optim.lr."
        )
