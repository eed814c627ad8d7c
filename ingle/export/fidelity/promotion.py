"""Chooses wider types for the weights that lose most of their change, within a budget of bytes.

Each merged weight is measured in its own type and in wider ones.  The step that saves most of the lost change per byte
is taken repeatedly, until enough survives or the next step exceeds the budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ingle.export.fidelity.measurement import TensorFidelity, mean_correlation

#: Types from narrow to wide.
LADDER = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
#: The same for rows that are not a multiple of 256.
SHORT_LADDER = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")

#: Mean correlation at which promotion stops.
ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class Promotion:
    """Result of a promotion.

    Attributes:
        types: New types by weight.
        extra_bytes: Additional size of the file.
        before: Mean correlation with the original types.
        expected: Mean correlation with the new types.
    """

    types: dict[str, str]
    extra_bytes: int
    before: float | None
    expected: float | None


def wider_types(type_name: str, num_columns: int) -> tuple[str, ...]:
    """Returns the wider types for a weight, narrow ones first."""
    ladder = LADDER if num_columns % 256 == 0 else SHORT_LADDER
    if type_name in ladder:
        return ladder[ladder.index(type_name) + 1 :]
    return () if type_name in ("f32", "f16", "bf16", "q8_0") else ladder[-3:]


def promote(
    weights: Sequence[tuple[str, str, int]],
    measure_as: Callable[[str, str], TensorFidelity],
    budget_bytes: int,
    *,
    enough: float = ENOUGH,
) -> Promotion:
    """Chooses wider types.

    Args:
        weights: Name, type and number of columns of every merged weight.
        measure_as: Measures a weight in a type.
        budget_bytes: Largest additional size.
        enough: Mean correlation at which promotion stops.
    """
    options = {
        name: [measure_as(name, kind) for kind in (own, *wider_types(own, columns))] for name, own, columns in weights
    }
    chosen = dict.fromkeys(options, 0)
    before = _correlation(options, chosen)
    queue: list[tuple[float, str, int]] = []
    for name, found in options.items():
        _offer(queue, name, 0, found, budget_bytes)
    left = budget_bytes
    while queue and (_correlation(options, chosen) or 0.0) < enough:
        _, name, step = heapq.heappop(queue)
        cost = options[name][step].num_bytes - options[name][chosen[name]].num_bytes
        if cost <= left:
            left -= cost
            chosen[name] = step
        _offer(queue, name, chosen[name], options[name], left)
    types = {name: options[name][step].type for name, step in chosen.items() if step}
    return Promotion(types, budget_bytes - left, before, _correlation(options, chosen))


def _offer(
    queue: list[tuple[float, str, int]], name: str, step: int, found: Sequence[TensorFidelity], left: int
) -> None:
    """Adds the affordable wider type that saves most per byte to the queue."""
    own = found[step]
    gains = [
        ((own.lost_energy - other.lost_energy) / max(1, other.num_bytes - own.num_bytes), index)
        for index, other in enumerate(found[step + 1 :], step + 1)
        if other.num_bytes - own.num_bytes <= left
    ]
    gain, index = max(gains, default=(0.0, step))
    if gain > 0:
        heapq.heappush(queue, (-gain, name, index))


def _correlation(options: Mapping[str, Sequence[TensorFidelity]], chosen: Mapping[str, int]) -> float | None:
    return mean_correlation([options[name][step] for name, step in chosen.items()])
