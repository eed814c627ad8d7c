"""The curve of losses over dimensions, where it crosses a target, and how certain that is.

Legend: G held-out groups, C configurations, R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: Loss and denominator of each group, [G, 2], for each seed. Seeds may hold out other groups.
Tables = Sequence[Floats]

NUM_REPLICATES = 2_000
#: Replicates that are computed at once.
_AT_ONCE = 200
#: Share of the replicates that must reach a target for it to count as reached.
_REACHED = 0.9


def half_of(table_G2: Floats, part: int) -> Floats:
    """Returns one of two halves of the groups, drawn once for each number of groups; all of a single group."""
    if len(table_G2) < 2:
        return table_G2
    order = np.random.default_rng(len(table_G2)).permutation(len(table_G2))
    return table_G2[np.sort(order[part::2])]


def mean_losses(tables: Tables) -> Floats:
    """Returns the loss per unit of each seed."""
    return np.array([table[:, 0].sum() / (table[:, 1].sum() or 1.0) for table in tables])


def resample(configurations: Sequence[Tables], seed: int = 0, num: int = NUM_REPLICATES) -> Floats:
    """Returns losses of resampled seeds and groups, [R, C].

    A replicate draws seeds, and groups within each seed, with replacement, the same ones for all configurations. So
    differences between configurations are paired.

    Args:
        configurations: The tables of each; all have the same seeds, and the same groups for each of them.
        seed: Seed of the draws.
        num: Number of replicates.
    """
    draws = np.random.default_rng(seed)
    num_seeds = len(configurations[0])
    chosen_RS = draws.multinomial(num_seeds, [1 / num_seeds] * num_seeds, num) / num_seeds
    total_RC = np.zeros((num, len(configurations)))
    for index in range(num_seeds):
        stacked_CG2 = np.stack([tables[index] for tables in configurations])
        count = stacked_CG2.shape[1]
        for start in range(0, num, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, num))
            weights_RG = draws.multinomial(count, [1 / count] * count, part.stop - part.start).astype(float)
            losses_RC = (weights_RG @ stacked_CG2[..., 0].T) / np.maximum(weights_RG @ stacked_CG2[..., 1].T, 1e-300)
            total_RC[part] += chosen_RS[part, index, None] * losses_RC
    return total_RC


def falling(losses: Floats) -> Floats:
    """Returns the non-increasing sequence that is closest to the losses by least squares.

    Source: Ayer et al. 1955, "An Empirical Distribution Function for Sampling with Incomplete Information", the pool
    adjacent violators algorithm.
    """
    blocks: list[tuple[float, int]] = []
    for loss in losses:
        total, size = float(loss), 1
        while blocks and blocks[-1][0] / blocks[-1][1] <= total / size:
            before, width = blocks.pop()
            total, size = total + before, size + width
        blocks.append((total, size))
    return np.concatenate([np.full(size, total / size) for total, size in blocks])


def crossing(dims: Sequence[int], losses: Floats, target: float) -> float:
    """Returns the dimension at which a falling curve reaches a target; infinity if it does not.

    It is between two dimensions by their logarithms. If the smallest one reaches the target, it is that one.
    """
    curve, places = falling(losses), np.log2(dims)
    for index in range(len(curve)):
        if curve[index] <= target:
            if index == 0:
                return float(dims[0])
            share = (curve[index - 1] - target) / (curve[index - 1] - curve[index])
            return float(2 ** (places[index - 1] + share * (places[index] - places[index - 1])))
    return math.inf


@dataclass(frozen=True, slots=True)
class Dimension:
    """The smallest dimension that reaches a target.

    Attributes:
        value: The estimate; None if the curve does not reach the target.
        low: Lower end of the 95 % interval; None if it is below the smallest dimension.
        high: Upper end; None if it is above the largest dimension.
        reached: Whether the curve reaches the target, and at least 90 % of the replicates do.
        has_gain: Whether unrestricted training lowers the loss at all, at 5 %; without that, no figure means anything.
        largest: The largest dimension that was tried.
    """

    value: float | None
    low: float | None
    high: float | None
    reached: bool
    has_gain: bool
    largest: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures."""
        return {name: getattr(self, name) for name in ("value", "low", "high", "reached", "has_gain")}


def find_dimension(
    dims: Sequence[int], points: Sequence[Tables], floor: Tables, ceiling: Tables, threshold: float
) -> Dimension:
    """Finds the smallest dimension whose loss reaches a share of the gain of unrestricted training.

    Args:
        dims: The dimensions, rising.
        points: Tables of each dimension.
        floor: Tables before the first step.
        ceiling: Tables of unrestricted training.
        threshold: Share of the gain, 0.9 for d90.
    """
    own = [float(mean_losses(tables).mean()) for tables in (floor, ceiling, *points)]
    value = crossing(dims, np.array(own[2:]), own[0] - threshold * (own[0] - own[1]))
    replicates_RC = resample([floor, ceiling, *points])
    gains_R = replicates_RC[:, 0] - replicates_RC[:, 1]
    if own[0] <= own[1] or float(np.quantile(gains_R, 0.025)) <= 0:
        return Dimension(None, None, None, reached=False, has_gain=False, largest=dims[-1])
    targets_R = replicates_RC[:, 0] - threshold * (replicates_RC[:, 0] - replicates_RC[:, 1])
    rows = zip(replicates_RC, targets_R, strict=True)
    found_R = np.array([crossing(dims, row[2:], target) for row, target in rows])
    low, high = np.quantile(found_R, [0.025, 0.975], method="nearest").tolist()
    return Dimension(
        value=value if math.isfinite(value) else None,
        low=low if dims[0] < low < math.inf else None,
        high=high if math.isfinite(high) else None,
        reached=math.isfinite(value) and float(np.isfinite(found_R).mean()) >= _REACHED,
        has_gain=True,
        largest=dims[-1],
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher the loss of a configuration is than that of another, paired.

    Attributes:
        value: The difference.
        stderr: Its standard error.
        ci95: Its 95 % interval.
        p: Two-sided p-value of no difference.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    p: float


def compare(tables: Tables, reference: Tables) -> Difference:
    """Compares two configurations by resampling seeds and groups."""
    value = float(mean_losses(tables).mean() - mean_losses(reference).mean())
    replicates_RC = resample([tables, reference])
    differences_R = replicates_RC[:, 0] - replicates_RC[:, 1]
    stderr = float(differences_R.std())
    low, high = np.quantile(differences_R, [0.025, 0.975]).tolist()
    p = math.erfc(abs(value) / stderr / math.sqrt(2)) if stderr else float(value == 0)
    return Difference(value, stderr, (low, high), p)


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's method.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    corrected, largest = [1.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, ps[index] * (len(ps) - place)))
        corrected[index] = largest
    return corrected
