"""From measured rows to a recommendation with its reason, and what is commonly said about formats against it.

What a format costs is counted in nats a token: 0.02 is about 2 % of perplexity, or a mean divergence that llama.cpp's
table for an 8B model puts between Q4_K_M (0.031) and Q5_K_M (0.011).  Divergence decides, since it sees every change;
on a text that the model is bad at, perplexity rises and falls by chance, and even gains from noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ingle.evaluation.formats.result import FormatResult
from ingle.evaluation.formats.wording import small
from ingle.evaluation.run.divergence import FEW_TOKENS
from ingle.wording import plural

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
    """A common claim, and what was measured here.

    Attributes:
        claim: What the field says.
        measured: The figures.
        verdict: Whether they agree: ``yes``, ``no``, ``in part``, or ``open`` where the formats were not measured.
    """

    claim: str
    measured: str
    verdict: Literal["yes", "no", "in part", "open"]


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

    The upper end of the mean divergence counts; a loss that has risen more than the limit beyond its interval rules a
    format out too.

    Args:
        rows: QuantModule formats; the unpacked model is not among them.
        limit: Nats a token.
    """
    by_name = {row.name: row for row in rows}
    front = [by_name[name] for name in pareto_front(rows)]
    if not front:
        return Choice(None, False, "no format was measured.")
    # A format whose interval is narrow may fit where the one that beats it on the front does not.
    everything = sorted(rows, key=lambda row: row.size_bytes)
    fitting = [row for row in front if _fits(row, limit)] or [row for row in everything if _fits(row, limit)]
    if not fitting:
        best = min(front, key=_cost)
        return Choice(
            best.name,
            False,
            f"no measured format stays within {limit:g} nats a token; {best.name} comes closest with "
            f"{_told(best, limit)} at {best.bits_per_weight:.2f} bits a weight.",
        )
    chosen = fitting[0]
    unbeaten = " that no other beats" if chosen in front else ""
    reason = (
        f"the smallest format{unbeaten} with a divergence of at most {limit:g} nats a token (about "
        f"{100 * limit:g} % of perplexity): {_told(chosen, limit)} at {chosen.bits_per_weight:.2f} bits a weight."
    )
    smaller = [row for row in front if row.size_bytes < chosen.size_bytes]
    if smaller:
        reason += f" The next smaller one, {smaller[-1].name}, has {_told(smaller[-1], limit)}."
    return Choice(chosen.name, True, reason)


def warnings(num_tokens: int, num_windows: int) -> list[str]:
    """Why the figures of a comparison may be far from those of the next text."""
    if num_tokens < FEW_TOKENS:
        return [
            f"Only {plural(num_tokens, 'token')} {'was' if num_tokens == 1 else 'were'} measured, so the figures are "
            f"rough and the recommendation may change with the text. Use a text of at least {FEW_TOKENS:,} tokens."
        ]
    if num_windows == 1:
        return ["The text is a single window, so there are no intervals. Use a longer text."]
    return []


def sayings(rows: Sequence[FormatResult], limit: float = LIMIT) -> list[Saying]:
    """Common advice on llama.cpp's mixes, each with the figures measured here."""
    by_name = {row.name: row for row in rows}
    return [_medium_over_small(by_name), _tests_only(by_name, limit), _balance(by_name, limit)]


def _medium_over_small(rows: Mapping[str, FormatResult]) -> Saying:
    claim = "K_M over K_S: the medium mixes are worth their few more bits."
    kinds = [kind for kind in ("q5_k", "q4_k", "q3_k") if f"{kind}_m" in rows and f"{kind}_s" in rows]
    pairs = [(rows[f"{kind}_m"], rows[f"{kind}_s"]) for kind in kinds]
    if not pairs:
        return Saying(claim, "no such pair was measured", "open")
    figures = [
        f"{medium.name} {_value(medium)} at {medium.bits_per_weight:.2f} bits, "
        f"{small.name} {_value(small)} at {small.bits_per_weight:.2f}"
        for medium, small in pairs
    ]
    return Saying(
        claim, f"divergence {'; '.join(figures)}", _verdict([_is_surely_less(medium, small) for medium, small in pairs])
    )


def _tests_only(rows: Mapping[str, FormatResult], limit: float) -> Saying:
    claim = "Q2_K and the Q3 mixes are for tests only."
    found = [rows[name] for name in ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l") if name in rows]
    if not found:
        return Saying(claim, "none of them was measured", "open")
    figures = ", ".join(f"{row.name} {_told(row, limit)}" for row in found)
    return Saying(
        claim, f"divergence {figures}; the limit is {limit:g}", _verdict([not _fits(row, limit) for row in found])
    )


def _balance(rows: Mapping[str, FormatResult], limit: float) -> Saying:
    claim = "Q5_K_M is the balance of size and quality, Q4_K_M what saves memory."
    five, four = rows.get("q5_k_m"), rows.get("q4_k_m")
    if five is None:
        return Saying(claim, "q5_k_m was not measured", "open")
    figures = f"q5_k_m {_told(five, limit)} at {five.bits_per_weight:.2f} bits"
    if four is not None:
        figures += f", q4_k_m {_told(four, limit)} at {four.bits_per_weight:.2f}"
    return Saying(claim, f"divergence {figures}; the limit is {limit:g}", _verdict([_fits(five, limit)]))


def _verdict(agreeing: Sequence[bool]) -> Literal["yes", "no", "in part"]:
    return "yes" if all(agreeing) else "in part" if any(agreeing) else "no"


def _is_surely_less(one: FormatResult, other: FormatResult) -> bool:
    """Whether one diverges less than another by more than their intervals."""
    low = other.quality.kl.value if other.quality.kl.low is None else other.quality.kl.low
    return one.quality.kl.upper < low


def _cost(row: FormatResult) -> float:
    """What is held against the limit: the upper end of the divergence's interval."""
    return row.quality.kl.upper


def _fits(row: FormatResult, limit: float) -> bool:
    loss = row.quality.loss
    return _cost(row) <= limit and (loss.value if loss.low is None else loss.low) <= limit


def _value(row: FormatResult) -> str:
    """The divergence, as the table has it."""
    return small(row.quality.kl.value)


def _told(row: FormatResult, limit: float) -> str:
    """The divergence, and the end of its interval where that is what decides."""
    if row.quality.kl.value <= limit < _cost(row):
        return f"{_value(row)} (its 95 % interval reaches {small(_cost(row))})"
    return _value(row)
