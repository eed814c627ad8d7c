"""From measured rows to a recommendation with its reason, beside what the field says without having measured.

Loss is counted in nats a token: 0.02 is about 2 % of perplexity, or a mean divergence that llama.cpp's table for an
8B model puts between Q4_K_M (0.031) and Q5_K_M (0.011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ingle.evaluation.formats.result import FormatResult

#: Nats a token that a format may cost.
LIMIT = 0.02


@dataclass(frozen=True, slots=True)
class Choice:
    """A recommendation.

    Attributes:
        name: The format; None where nothing was packed.
        within: Whether it stays within the limit.
        reason: Why this one, in a sentence or two, with the numbers.
    """

    name: str | None
    within: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Saying:
    """What people say, and what was measured here.

    Attributes:
        claim: What the field says.
        measured: The figures.
        holds: Whether they agree with it; None where the formats were not measured.
    """

    claim: str
    measured: str
    holds: bool | None


def pareto_front(rows: Sequence[FormatResult]) -> list[str]:
    """Names of the formats that no other one beats in size without losing in divergence, smallest first."""
    front: list[str] = []
    best = float("inf")
    for row in sorted(rows, key=lambda row: (row.size_bytes, row.quality.kl.value)):
        if row.quality.kl.value < best:
            front.append(row.name)
            best = row.quality.kl.value
    return front


def recommend(rows: Sequence[FormatResult], limit: float = LIMIT) -> Choice:
    """The smallest format on the front that stays within the limit.

    The upper ends of the intervals count: of the mean divergence, and of the mean rise of the loss.

    Args:
        rows: Packed formats; the unpacked model is not among them.
        limit: Nats a token.
    """
    by_name = {row.name: row for row in rows}
    front = [by_name[name] for name in pareto_front(rows)]
    if not front:
        return Choice(None, False, "no format was measured.")
    # A format whose interval is narrow may fit where the one that beats it on the front does not.
    everything = sorted(rows, key=lambda row: row.size_bytes)
    fitting = [row for row in front if _cost(row) <= limit] or [row for row in everything if _cost(row) <= limit]
    if not fitting:
        best = min(front, key=_cost)
        return Choice(
            best.name,
            False,
            f"no measured format stays within {limit:g} nats a token; {best.name} comes closest "
            f"with {_cost(best):.3g} ({best.bits_per_weight:.2f} bits a weight).",
        )
    chosen = fitting[0]
    where = " on the front" if chosen in front else ""
    reason = (
        f"the smallest{where} that costs at most {limit:g} nats a token (about {limit:.0%} of perplexity): "
        f"divergence {_with_end(chosen.quality.kl.value, chosen.quality.kl.upper)}, "
        f"loss {_with_end(chosen.quality.loss.value, chosen.quality.loss.upper)}, "
        f"{chosen.bits_per_weight:.2f} bits a weight."
    )
    smaller = [row for row in front if row.size_bytes < chosen.size_bytes]
    if smaller:
        reason += f" The next smaller one on the front, {smaller[-1].name}, costs {_cost(smaller[-1]):.3g}."
    return Choice(chosen.name, True, reason)


def sayings(rows: Sequence[FormatResult], limit: float = LIMIT) -> list[Saying]:
    """What the field says of llama.cpp's mixes, each beside the figures measured here."""
    by_name = {row.name: row for row in rows}
    return [_medium_over_small(by_name), _tests_only(by_name, limit), _balance(by_name, limit)]


def _medium_over_small(rows: Mapping[str, FormatResult]) -> Saying:
    claim = "K_M over K_S: the medium mixes are worth their few more bits."
    kinds = [kind for kind in ("q5_k", "q4_k", "q3_k") if f"{kind}_m" in rows and f"{kind}_s" in rows]
    pairs = [(rows[f"{kind}_m"], rows[f"{kind}_s"]) for kind in kinds]
    if not pairs:
        return Saying(claim, "no such pair was measured", None)
    figures = [
        f"{medium.name} {medium.quality.kl.value:.3g} at {medium.bits_per_weight:.2f} bits, "
        f"{small.name} {small.quality.kl.value:.3g} at {small.bits_per_weight:.2f}"
        for medium, small in pairs
    ]
    return Saying(claim, "; ".join(figures), all(m.quality.kl.value < s.quality.kl.value for m, s in pairs))


def _tests_only(rows: Mapping[str, FormatResult], limit: float) -> Saying:
    claim = "Q2_K and the Q3 mixes are for tests only."
    found = [rows[name] for name in ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l") if name in rows]
    if not found:
        return Saying(claim, "none of them was measured", None)
    figures = ", ".join(f"{row.name} costs {_cost(row):.3g}" for row in found)
    return Saying(claim, f"{figures}; the limit is {limit:g}", all(_cost(row) > limit for row in found))


def _balance(rows: Mapping[str, FormatResult], limit: float) -> Saying:
    claim = "Q5_K_M is the balance of size and quality, Q4_K_M what saves memory."
    five, four = rows.get("q5_k_m"), rows.get("q4_k_m")
    if five is None:
        return Saying(claim, "q5_k_m was not measured", None)
    figures = f"q5_k_m costs {_cost(five):.3g} at {five.bits_per_weight:.2f} bits"
    if four is not None:
        figures += f", q4_k_m {_cost(four):.3g} at {four.bits_per_weight:.2f}"
    return Saying(claim, f"{figures}; the limit is {limit:g}", _cost(five) <= limit)


def _cost(row: FormatResult) -> float:
    return max(row.quality.kl.upper, row.quality.loss.upper)


def _with_end(value: float, upper: float) -> str:
    return f"{value:.3g} (at most {upper:.3g})" if upper > value else f"{value:.3g}"
