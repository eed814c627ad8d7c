"""What a report on data says about preferences and judgements."""

from __future__ import annotations

from ingle.report.data_results import PreferenceReport, Rate
from ingle.wording import plural

#: Between these shares, the longer answer wins about as often as the shorter one.
_UNBIASED = (0.45, 0.55)
#: A larger part of pairs with one cut answer is a problem.
_MANY_CUT = 0.01
#: Classes of judged answers that differ by more than this factor are a problem.
_UNEVEN = 4.0


def preference_figures(report: PreferenceReport) -> list[tuple[str, str]]:
    """Returns names and values for the table of figures."""
    is_judged = report.pairs == 0
    better, worse = ("good", "bad") if is_judged else ("better", "worse")
    answers = f"{plural(report.answers, 'answer')} to {plural(report.prompts, 'prompt')}"
    if is_judged:
        answers += f", {report.good:,} good, {report.bad:,} bad"
    else:
        answers += f", {plural(report.pairs, 'pair')}" + (f", {plural(report.ties, 'tie')}" if report.ties else "")
    cut = f"{report.better_truncated:,} {better}, {report.worse_truncated:,} {worse}"
    repeated = f"{report.repeated:,} judged more than once, {report.contradictory:,} of them both ways"
    figures = [
        ("answers", answers),
        ("near duplicates of prompts", plural(report.near_prompts, "prompt")),
        ("tokens of answers, mean", f"{better} {report.better_tokens:,.1f}, {worse} {report.worse_tokens:,.1f}"),
        ("answers without their end", cut),
        ("repeated judgements", repeated),
        ("wrong judgements", _describe_noise(report)),
    ]
    if report.longer_wins is not None:
        figures.append(("the longer answer wins", _describe(report.longer_wins, "prompt")))
    if is_judged and report.good and report.bad:
        weights = (max(report.bad / report.good, 1.0), max(report.good / report.bad, 1.0))
        figures.append(("weights that balance them", f"good {weights[0]:.2f}, bad {weights[1]:.2f} (auto)"))
    if report.beta is not None:
        assumed = "" if report.noise is not None else ", if 5 % of the judgements are wrong"
        figures.append(
            ("proposed objective.beta", f"{report.beta:.2g}: smoothed DPO is at rest 0.1 nats per token away{assumed}")
        )
    if report.noise is not None and report.noise.share > 0:
        figures.append(("proposed objective.label_smoothing", f"{report.noise.share:.2g}"))
    return figures


def preference_problems(report: PreferenceReport) -> list[str]:
    """Returns what a user should look at before training, in sentences."""
    problems = []
    if report.contradictory:
        verb = "is" if report.contradictory == 1 else "are"
        noun = plural(report.contradictory, "answer" if report.pairs == 0 else "pair")
        problems.append(f"{noun} {verb} judged both ways (first {report.contradictions[0].second}).")
    wins = report.longer_wins
    if wins is not None and not _UNBIASED[0] <= wins.share <= _UNBIASED[1] and not wins.low <= 0.5 <= wins.high:
        which, share = ("longer", wins.share) if wins.share > 0.5 else ("shorter", 1 - wins.share)
        problems.append(f"A rule that prefers the {which} answer is right in {share:.1%} of the pairs.")
    if report.half_truncated > _MANY_CUT * report.pairs:
        share = report.half_truncated / report.pairs
        problems.append(f"In {share:.1%} of the pairs one answer lost its end, so the loss learns from the cut.")
    if report.pairs == 0:
        if not report.good or not report.bad:
            problems.append(f"All answers are {'good' if report.good else 'bad'}, so there is nothing to tell apart.")
        elif max(report.good, report.bad) > _UNEVEN * min(report.good, report.bad):
            problems.append(f"{report.good:,} answers are good and {report.bad:,} are bad.")
    return problems


def _describe(rate: Rate, noun: str) -> str:
    return f"{rate.share:.1%} ({rate.low:.1%} to {rate.high:.1%}, {plural(rate.count, noun)})"


def _describe_noise(report: PreferenceReport) -> str:
    if report.noise is None:
        return f"not estimable from {plural(report.repeated, 'repeated judgement')}"
    return "about " + _describe(report.noise, "repeated judgement")
