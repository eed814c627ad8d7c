"""Compares base and tuned model on the same samples: every metric's difference, its interval and its p-value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ingle.config.evaluate import TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation.class_table import find_worst, tabulate_classes
from ingle.evaluation.scorers import Scorer, Scores, make_scorers
from ingle.evaluation.statistics import Floats, Groups
from ingle.evaluation.statistics.intervals import Interval
from ingle.evaluation.statistics.procedures import Significance, paired_interval, paired_test, single_interval
from ingle.evaluation.statistics.significance import holm
from ingle.evaluation.tasks.task_result import TaskResult
from ingle.report.results import (
    Bounds,
    Comparison,
    MetricComparison,
    MetricSummary,
    Pair,
    SampleComparison,
    SampleSummary,
    Seconds,
    ShownSamples,
    Summary,
    UnparsedAnswers,
)
from ingle.report.verdicts import MIN_SAMPLES, find_outcome, verdict

#: A true difference of this many standard errors is significant at 5 % in 80 of 100 experiments.
_MDE80 = 2.8016


def compare_all(bases: Mapping[str, TaskResult], tuned: TaskResult, task: TaskConfig) -> dict[str, Comparison]:
    """Compares a model with several baselines, given by their names; the strongest baseline comes first.

    Raises:
        EvaluationError: The results have different samples or labels.
    """
    metric = make_scorers(task)[0].metric

    def strength(comparison: Comparison) -> float:
        value = comparison.metrics[metric.name].base
        return -math.inf if value is None else value if metric.higher_is_better else -value

    compared = [compare(base, tuned, task, base_name=name) for name, base in bases.items()]
    return {comparison.base_name or "": comparison for comparison in sorted(compared, key=strength, reverse=True)}


def compare(base: TaskResult, tuned: TaskResult, task: TaskConfig, *, base_name: str | None = None) -> Comparison:
    """Compares the outputs of two models for the same samples.

    Args:
        base: Outputs of the base.
        tuned: Outputs of the tuned model.
        task: The task of both.
        base_name: What ``base`` is, if it is not the model without its training.

    Raises:
        EvaluationError: The two results have different samples or labels.
    """
    if base.samples != tuned.samples:
        raise EvaluationError(
            "The two results have different samples, so they cannot be compared.",
            why=f"{len(base.samples)} and {len(tuned.samples)} samples, not all with the same prompt and references",
            fix="run the same task with both models",
        )
    if (base.outputs.label_names, base.outputs.problem) != (tuned.outputs.label_names, tuned.outputs.problem):
        raise EvaluationError(
            "The two models predict different labels, so they cannot be compared.",
            why=f"{_shown_labels(base)} and {_shown_labels(tuned)}",
            fix="evaluate each of them alone",
        )
    scorers, groups = make_scorers(task), base.groups
    pairs = [
        (scorer.score(base.outputs, base.references), scorer.score(tuned.outputs, base.references))
        for scorer in scorers
    ]
    tests = [paired_test(scorer, *pair, task.seed, groups) for scorer, pair in zip(scorers, pairs, strict=True)]
    corrected = holm([test.p for test in tests])
    metrics = {
        scorer.metric.name: _compare_metric(scorer, *pair, test, p_holm, task.seed, groups)
        for scorer, pair, test, p_holm in zip(scorers, pairs, tests, corrected, strict=True)
    }
    headline = scorers[0].metric.name
    is_better, errors = scorers[0].metric.higher_is_better, tuple[int, ...]()
    if base_name is not None:
        errors = find_worst(tuned, pairs[0][1], higher_is_better=is_better, count=task.num_shown)
    return Comparison(
        headline=headline,
        verdict=verdict(headline, metrics[headline], len(metrics), base_name),
        outcome=metrics[headline].outcome,
        n=len(base.samples),
        metrics=metrics,
        samples=_compare_samples(base, tuned, scorers, pairs),
        shown=replace(_pick_shown(_gains(scorers[0], *pairs[0]), task), errors=errors),
        seconds=Seconds(base.seconds, tuned.seconds),
        base_name=base_name,
        classes=tabulate_classes(base, tuned, task),
    )


def summarize(result: TaskResult, task: TaskConfig) -> Summary:
    """Scores one model, with an interval for each metric.

    Args:
        result: Outputs of the model.
        task: Its task.
    """
    scorers = make_scorers(task)
    scores = {scorer.metric.name: scorer.score(result.outputs, result.references) for scorer in scorers}
    metrics = {}
    for scorer in scorers:
        found = scores[scorer.metric.name]
        interval, name = single_interval(scorer, found, task.seed, result.groups)
        metrics[scorer.metric.name] = MetricSummary(
            value=_finite(found.value),
            ci95=_bounds(interval),
            n=len(result.samples),
            interval=name,
            signature=found.signature,
            higher_is_better=scorer.metric.higher_is_better,
            unparsed=found.num_unparsed,
        )
    samples = tuple(
        SampleSummary(
            origin=sample.origin,
            prompt=sample.prompt,
            references=sample.references,
            answer=result.answer(index),
            scores={name: _finite(found.per_sample[index]) for name, found in scores.items()},
        )
        for index, sample in enumerate(result.samples)
    )
    return Summary(
        headline=scorers[0].metric.name, n=len(samples), metrics=metrics, samples=samples, seconds=result.seconds
    )


def _compare_metric(
    scorer: Scorer,
    base: Scores,
    tuned: Scores,
    test: Significance,
    p_holm: float,
    seed: int,
    groups: Groups | None,
) -> MetricComparison:
    interval, interval_name = paired_interval(scorer, base, tuned, seed, groups)
    gains_S = _gains(scorer, base, tuned)
    delta = tuned.value - base.value
    return MetricComparison(
        base=_finite(base.value),
        tuned=_finite(tuned.value),
        delta=_finite(delta),
        ci95=_bounds(interval),
        p=test.p,
        p_holm=p_holm,
        p_exact=test.p_exact,
        p_floor=test.floor,
        n=len(gains_S),
        test=test.test,
        test_exact=test.test_exact,
        interval=interval_name,
        signature=tuned.signature,
        higher_is_better=scorer.metric.higher_is_better,
        outcome=find_outcome(scorer.metric, delta, p_holm),
        num_better=int(np.sum(gains_S > 0)),
        num_worse=int(np.sum(gains_S < 0)),
        num_equal=int(np.sum(gains_S == 0)),
        mde80=_finite(_MDE80 * interval.stderr) if len(gains_S) >= MIN_SAMPLES else None,
        base_ci95=_bounds(single_interval(scorer, base, seed, groups)[0]),
        tuned_ci95=_bounds(single_interval(scorer, tuned, seed, groups)[0]),
        unparsed=UnparsedAnswers(base.num_unparsed, tuned.num_unparsed) if scorer.metric.kind == "rate" else None,
    )


def _gains(scorer: Scorer, base: Scores, tuned: Scores) -> Floats:
    """Returns the gain of each sample, positive for an improvement; rounding errors count as equal."""
    gains_S = (tuned.per_sample - base.per_sample) * (1.0 if scorer.metric.higher_is_better else -1.0)
    scale = np.maximum(np.abs(base.per_sample), np.abs(tuned.per_sample))
    return np.where(np.abs(gains_S) <= 1e-9 * scale, 0.0, gains_S)


def _compare_samples(
    base: TaskResult, tuned: TaskResult, scorers: Sequence[Scorer], pairs: Sequence[tuple[Scores, Scores]]
) -> tuple[SampleComparison, ...]:
    return tuple(
        SampleComparison(
            origin=sample.origin,
            prompt=sample.prompt,
            references=sample.references,
            base=base.answer(index),
            tuned=tuned.answer(index),
            scores={
                scorer.metric.name: Pair(_finite(one.per_sample[index]), _finite(other.per_sample[index]))
                for scorer, (one, other) in zip(scorers, pairs, strict=True)
            },
        )
        for index, sample in enumerate(base.samples)
    )


def _pick_shown(gains_S: Floats, task: TaskConfig) -> ShownSamples:
    """Picks the largest gains and losses and, as a check on them, random samples."""
    order = np.argsort(-gains_S, kind="stable")
    gains = (int(index) for index in order[: task.num_shown] if gains_S[index] > 0)
    losses = (int(index) for index in order[::-1][: task.num_shown] if gains_S[index] < 0)
    drawn = np.random.default_rng(task.seed).permutation(len(gains_S))[: task.num_shown]
    return ShownSamples(tuple(gains), tuple(losses), tuple(sorted(int(index) for index in drawn)))


def _shown_labels(result: TaskResult) -> str:
    names = result.outputs.label_names
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _bounds(interval: Interval) -> Bounds:
    return _finite(interval.low), _finite(interval.high)


def _finite(value: float) -> float | None:
    """Returns the value, or None if JSON cannot represent it."""
    return float(value) if math.isfinite(value) else None
