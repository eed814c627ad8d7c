"""Recommends one of the measured formats, and checks common advice on formats against the figures.

The cost of a format is its mean divergence in nats per token. 0.02 is about 2 % of perplexity, and between the
divergences of Q4_K_M (0.031) and Q5_K_M (0.011) in llama.cpp's table for an 8B model. The recommendation uses
divergence because it reflects every change of the predictions. Perplexity can even improve by chance, above all on a
text that the model predicts badly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ingle.report.format_results import Advice, FormatResult, Recommendation, nats_text
from ingle.wording import plural

#: Largest cost of a recommended format, in nats per token.
LIMIT = 0.02

#: Scored tokens by default, and the number below which the figures are rough.
NUM_TOKENS, FEW_TOKENS = 16_384, 1000


def pareto_front(rows: Sequence[FormatResult]) -> list[str]:
    """Returns the names of the formats on the Pareto front of size and divergence, smallest first."""
    front: list[str] = []
    best = float("inf")
    for row in sorted(rows, key=lambda row: (row.size_bytes, row.quality.kl.value)):
        if row.quality.kl.value < best:
            front.append(row.name)
            best = row.quality.kl.value
    return front


def recommend(rows: Sequence[FormatResult], limit: float = LIMIT) -> Recommendation:
    """Recommends the smallest format on the front that stays within the limit.

    The upper end of the divergence's interval must stay within the limit. A format whose loss has risen by more than
    the limit, even at the lower end of its interval, is excluded too.

    Args:
        rows: Quantized formats, without the unquantized model.
        limit: Nats per token.
    """
    by_name = {row.name: row for row in rows}
    front = [by_name[name] for name in pareto_front(rows)]
    if not front:
        return Recommendation(None, False, "no format was measured.")
    # A format with a narrow interval may fit where the one that beats it on the front does not.
    by_size = sorted(rows, key=lambda row: row.size_bytes)
    fitting = [row for row in front if _fits(row, limit)] or [row for row in by_size if _fits(row, limit)]
    if not fitting:
        best = min(front, key=lambda row: row.quality.kl.upper)
        return Recommendation(
            best.name,
            False,
            f"no measured format stays within {limit:g} nats per token; {best.name} comes closest with "
            f"{_cost(best, limit)} at {best.bits_per_weight:.2f} bits per weight.",
        )
    chosen = fitting[0]
    unbeaten = " that no other beats" if chosen in front else ""
    reason = (
        f"the smallest format{unbeaten} with a divergence of at most {limit:g} nats per token (about "
        f"{100 * limit:g} % of perplexity): {_cost(chosen, limit)} at {chosen.bits_per_weight:.2f} bits per weight."
    )
    smaller = [row for row in front if row.size_bytes < chosen.size_bytes]
    if smaller:
        reason += f" The next smaller one, {smaller[-1].name}, has {_cost(smaller[-1], limit)}."
    return Recommendation(chosen.name, True, reason)


def warnings(num_tokens: int, num_windows: int) -> list[str]:
    """Returns why the figures may differ on another text."""
    if num_tokens < FEW_TOKENS:
        return [
            f"Only {plural(num_tokens, 'token')} {'was' if num_tokens == 1 else 'were'} measured, so the figures are "
            f"rough and the recommendation may change with the text. Use a text of at least {FEW_TOKENS:,} tokens."
        ]
    if num_windows == 1:
        return ["The text is a single window, so there are no intervals. Use a longer text."]
    return []


def check_advice(rows: Sequence[FormatResult], limit: float = LIMIT) -> list[Advice]:
    """Returns common advice on llama.cpp's mixes, each with the figures measured here."""
    by_name = {row.name: row for row in rows}
    return [_medium_over_small(by_name), _tests_only(by_name, limit), _balance(by_name, limit)]


def _medium_over_small(rows: Mapping[str, FormatResult]) -> Advice:
    claim = "Prefer K_M to K_S: the medium mixes are worth their extra bits."
    names = [(f"{kind}_m", f"{kind}_s") for kind in ("q5_k", "q4_k", "q3_k")]
    pairs = [(rows[medium], rows[small]) for medium, small in names if medium in rows and small in rows]
    if not pairs:
        return Advice(claim, "no such pair was measured", "open")
    figures = [
        f"{medium.name} {nats_text(medium.quality.kl.value)} at {medium.bits_per_weight:.2f} bits, "
        f"{small.name} {nats_text(small.quality.kl.value)} at {small.bits_per_weight:.2f}"
        for medium, small in pairs
    ]
    agreeing = [medium.quality.kl.upper < small.quality.kl.lower for medium, small in pairs]
    return Advice(claim, f"divergence {'; '.join(figures)}", _verdict(agreeing))


def _tests_only(rows: Mapping[str, FormatResult], limit: float) -> Advice:
    claim = "Q2_K and the Q3 mixes are only good for tests."
    found = [rows[name] for name in ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l") if name in rows]
    if not found:
        return Advice(claim, "none of them was measured", "open")
    figures = ", ".join(f"{row.name} {_cost(row, limit)}" for row in found)
    agreeing = [not _fits(row, limit) for row in found]
    return Advice(claim, f"divergence {figures}; the limit is {limit:g}", _verdict(agreeing))


def _balance(rows: Mapping[str, FormatResult], limit: float) -> Advice:
    claim = "Q5_K_M balances size and quality; Q4_K_M saves memory."
    five, four = rows.get("q5_k_m"), rows.get("q4_k_m")
    if five is None:
        return Advice(claim, "q5_k_m was not measured", "open")
    figures = f"q5_k_m {_cost(five, limit)} at {five.bits_per_weight:.2f} bits"
    if four is not None:
        figures += f", q4_k_m {_cost(four, limit)} at {four.bits_per_weight:.2f}"
    return Advice(claim, f"divergence {figures}; the limit is {limit:g}", _verdict([_fits(five, limit)]))


def _verdict(agreeing: Sequence[bool]) -> Literal["yes", "no", "in part"]:
    return "yes" if all(agreeing) else "in part" if any(agreeing) else "no"


def _fits(row: FormatResult, limit: float) -> bool:
    return row.quality.kl.upper <= limit and row.quality.loss.lower <= limit


def _cost(row: FormatResult, limit: float) -> str:
    """Returns the divergence, with the end of its interval if that is what exceeds the limit."""
    kl = row.quality.kl
    if kl.value <= limit < kl.upper:
        return f"{nats_text(kl.value)} (its 95 % interval reaches {nats_text(kl.upper)})"
    return nats_text(kl.value)
