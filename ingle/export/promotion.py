"""Wider types for the weights that lose most of their change, within a budget of bytes.

Each merged weight is measured in its own type and in wider ones.  Then the step that saves most of the lost change for
its bytes is taken, again and again, until enough survives or the next step would cost more than is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingle.export.fidelity import TensorFidelity, mean_correlation

#: Types from narrow to wide; a weight climbs from its own.
LADDER = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
#: For rows that are not whole blocks of 256.
SHORT_LADDER = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")

#: Correlation over all weights at which climbing ends.
ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class Promotion:
    """What climbing came to.

    Attributes:
        types: The new type of every weight that got one.
        extra_bytes: What they cost.
        before: Correlation over all weights in their own types.
        expected: Correlation with the new ones.
    """

    types: dict[str, str]
    extra_bytes: int
    before: float | None
    expected: float | None


def steps_above(type_name: str, num_columns: int) -> tuple[str, ...]:
    """Wider types for a weight, narrow ones first."""
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
        weights: Name, type and columns of every merged weight.
        measure_as: What would survive of a weight in a type.
        budget_bytes: Most bytes more.
        enough: Correlation at which it ends.
    """
    if not weights:
        return Promotion({}, 0, None, None)
    options = {
        name: [measure_as(name, step) for step in (own, *steps_above(own, columns))] for name, own, columns in weights
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
    """Puts the best of the steps above that can be paid into the queue, by what it saves for its bytes."""
    own = found[step]
    gains = [
        ((own.lost_energy - other.lost_energy) / max(1, other.num_bytes - own.num_bytes), place)
        for place, other in enumerate(found[step + 1 :], step + 1)
        if other.num_bytes - own.num_bytes <= left
    ]
    gain, place = max(gains, default=(0.0, step))
    if gain > 0:
        heapq.heappush(queue, (-gain, name, place))


def _correlation(options: dict[str, list[TensorFidelity]], chosen: dict[str, int]) -> float | None:
    return mean_correlation([options[name][step] for name, step in chosen.items()])
