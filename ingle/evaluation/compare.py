"""Base against tuned on the same samples: every metric's difference, its interval and its p-value.

Which interval and which test a metric gets follows from its kind and is named in the report:

======  =============================  ===========================================  ====================
kind    interval of the difference     ``p``                                        ``p_exact``
======  =============================  ===========================================  ====================
rate    Newcombe's paired score        exact McNemar                                the same
ratio   paired BCa bootstrap           exact sign-flip of the per-sample numerator  the same
corpus  paired BCa bootstrap           approximate randomization of the score       exact sign-flip of the
                                       itself, 10,000 trials                        per-sample scores
======  =============================  ===========================================  ====================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingle.config.evaluate import TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation import intervals, stats, wording
from ingle.evaluation.intervals import Interval
from ingle.evaluation.result import TaskResult
from ingle.evaluation.scorers import Scorer, Scores, make_scorers

NUM_TRIALS = 10_000
NUM_RESAMPLES = 10_000

#: Standard errors that a difference must have to be found at 5 % in 80 of 100 such experiments.
_MDE80 = 2.8016


@dataclass(frozen=True, slots=True)
class _Test:
    name: str
    p: float
    exact_name: str
    p_exact: float
    floor: float = 0.0


def compare(base: TaskResult, tuned: TaskResult, task: TaskConfig) -> dict[str, Any]:
    """Compares what two models did with the same samples.

    Args:
        base: What the base did.
        tuned: What the tuned model did.
        task: The task both were given.

    Returns:
        Plain data: ``metrics`` (by name; ``base, tuned, delta, ci95, p, p_holm, p_exact, n, test, interval,
        signature, outcome, ...``), ``samples`` (``prompt, references, base, tuned, scores``), ``shown`` (indices
        of the largest gains and losses and of random samples), ``headline``, ``verdict``, ``n``.

    Raises:
        EvaluationError: The two did not answer the same samples.
    """
    _check_same_samples(base, tuned)
    scorers = make_scorers(task)
    pairs = [
        (scorer.score(base.outputs, base.references), scorer.score(tuned.outputs, base.references))
        for scorer in scorers
    ]
    tests = [_test(scorer, *pair, task.seed) for scorer, pair in zip(scorers, pairs, strict=True)]
    adjusted = stats.holm([test.p for test in tests])
    metrics = {
        scorer.name: _row(scorer, *pair, test, p_holm, task.seed)
        for scorer, pair, test, p_holm in zip(scorers, pairs, tests, adjusted, strict=True)
    }
    headline = scorers[0].name
    gains_S = _gains(scorers[0], *pairs[0])
    return {
        "headline": headline,
        "verdict": wording.verdict(headline, metrics[headline], len(metrics)),
        "outcome": metrics[headline]["outcome"],
        "n": len(base.samples),
        "metrics": metrics,
        "samples": _samples(base, tuned, scorers, pairs),
        "shown": _shown(gains_S, task),
        "seconds": {"base": base.seconds, "tuned": tuned.seconds},
    }


def summarize(result: TaskResult, task: TaskConfig) -> dict[str, Any]:
    """The scores of one model with their intervals; as :func:`compare`, with ``value`` in place of the pair.

    Args:
        result: What the model did.
        task: The task it was given.
    """
    scorers = make_scorers(task)
    scores = [scorer.score(result.outputs, result.references) for scorer in scorers]
    metrics = {}
    for scorer, found in zip(scorers, scores, strict=True):
        bounds, name = _single_interval(scorer, found, task.seed)
        metrics[scorer.name] = {
            "value": _finite(found.value),
            "ci95": [_finite(bounds.low), _finite(bounds.high)],
            "n": len(result.samples),
            "interval": name,
            "signature": found.signature,
            "higher_is_better": scorer.higher_is_better,
            "unparsed": found.num_unparsed,
        }
    samples = [
        {
            **sample.to_dict(),
            "answer": result.answer(index),
            "scores": {
                scorer.name: _finite(float(found.per_sample[index]))
                for scorer, found in zip(scorers, scores, strict=True)
            },
        }
        for index, sample in enumerate(result.samples)
    ]
    return {
        "headline": scorers[0].name,
        "n": len(samples),
        "metrics": metrics,
        "samples": samples,
        "seconds": result.seconds,
    }


def _check_same_samples(base: TaskResult, tuned: TaskResult) -> None:
    if base.samples != tuned.samples:
        raise EvaluationError(
            "The two results are of different samples, so they cannot be compared.",
            why=f"{len(base.samples)} and {len(tuned.samples)} samples, not all with the same prompt and references",
            fix="answer the same task again with both models",
        )


def _test(scorer: Scorer, base: Scores, tuned: Scores, seed: int) -> _Test:
    if scorer.kind == "rate":
        p = stats.mcnemar_exact(
            int(np.sum(base.per_sample > tuned.per_sample)), int(np.sum(base.per_sample < tuned.per_sample))
        )
        return _Test("exact McNemar", p, "exact McNemar", p)
    # Where both share the denominators, the difference of the scores grows with that of the numerators alone.
    if scorer.kind == "ratio" and np.array_equal(base.statistics[:, 1], tuned.statistics[:, 1]):
        p = stats.sign_flip_exact(tuned.statistics[:, 0] - base.statistics[:, 0])
        return _Test("exact sign-flip permutation", p, "exact sign-flip permutation", p)
    p = stats.randomization(base.statistics, tuned.statistics, scorer.aggregate, num_trials=NUM_TRIALS, seed=seed)
    return _Test(
        f"approximate randomization, {NUM_TRIALS:,} trials",
        p,
        "exact sign-flip permutation of per-sample scores",
        stats.sign_flip_exact(tuned.per_sample - base.per_sample),
        1 / (NUM_TRIALS + 1),
    )


def _row(scorer: Scorer, base: Scores, tuned: Scores, test: _Test, p_holm: float, seed: int) -> dict[str, Any]:
    bounds, interval_name = _paired_interval(scorer, base, tuned, seed)
    gains_S = _gains(scorer, base, tuned)
    delta = tuned.value - base.value
    row: dict[str, Any] = {
        "base": _finite(base.value),
        "tuned": _finite(tuned.value),
        "delta": _finite(delta),
        "ci95": [_finite(bounds.low), _finite(bounds.high)],
        "p": test.p,
        "p_holm": p_holm,
        "p_exact": test.p_exact,
        "p_floor": test.floor,
        "n": len(gains_S),
        "test": test.name,
        "test_exact": test.exact_name,
        "interval": interval_name,
        "signature": tuned.signature,
        "higher_is_better": scorer.higher_is_better,
        "outcome": wording.outcome(scorer, delta, p_holm),
        "num_better": int(np.sum(gains_S > 0)),
        "num_worse": int(np.sum(gains_S < 0)),
        "num_equal": int(np.sum(gains_S == 0)),
        "mde80": _finite(_MDE80 * bounds.stderr) if len(gains_S) >= wording.LEAST_SAMPLES else None,
    }
    for side, scores in (("base", base), ("tuned", tuned)):
        own, _ = _single_interval(scorer, scores, seed)
        row[f"{side}_ci95"] = [_finite(own.low), _finite(own.high)]
    if scorer.kind == "rate":
        row["unparsed"] = {"base": base.num_unparsed, "tuned": tuned.num_unparsed}
    return row


def _paired_interval(scorer: Scorer, base: Scores, tuned: Scores, seed: int) -> tuple[Interval, str]:
    if scorer.kind == "rate":
        was, now = base.per_sample > 0.5, tuned.per_sample > 0.5
        counts = (int(np.sum(cell)) for cell in (was & now, ~was & now, was & ~now, ~was & ~now))
        return intervals.newcombe_paired(*counts), "Newcombe paired score"
    bounds = intervals.paired_bootstrap(
        base.statistics, tuned.statistics, scorer.aggregate, num_resamples=NUM_RESAMPLES, seed=seed
    )
    return bounds, f"paired BCa bootstrap, {NUM_RESAMPLES:,} resamples"


def _single_interval(scorer: Scorer, scores: Scores, seed: int) -> tuple[Interval, str]:
    if scorer.kind == "rate":
        return intervals.wilson(int(scores.per_sample.sum()), len(scores.per_sample)), "Wilson score"
    bounds = intervals.bootstrap(scores.statistics, scorer.aggregate, num_resamples=NUM_RESAMPLES, seed=seed)
    return bounds, f"BCa bootstrap, {NUM_RESAMPLES:,} resamples"


def _gains(scorer: Scorer, base: Scores, tuned: Scores) -> stats.Floats:
    """What each sample gained, positive where it got better; rounding noise counts as equal."""
    gains_S = (tuned.per_sample - base.per_sample) * (1.0 if scorer.higher_is_better else -1.0)
    scale = np.maximum(np.abs(base.per_sample), np.abs(tuned.per_sample))
    return np.where(np.abs(gains_S) <= 1e-9 * scale, 0.0, gains_S)


def _samples(
    base: TaskResult, tuned: TaskResult, scorers: Sequence[Scorer], pairs: Sequence[tuple[Scores, Scores]]
) -> list[dict[str, Any]]:
    return [
        {
            **sample.to_dict(),
            "base": base.answer(index),
            "tuned": tuned.answer(index),
            "scores": {
                scorer.name: {
                    "base": _finite(float(one.per_sample[index])),
                    "tuned": _finite(float(other.per_sample[index])),
                }
                for scorer, (one, other) in zip(scorers, pairs, strict=True)
            },
        }
        for index, sample in enumerate(base.samples)
    ]


def _shown(gains_S: stats.Floats, task: TaskConfig) -> dict[str, list[int]]:
    """Indices of the samples worth reading: picked by score, and, as a check on that, picked blindly."""
    order = np.argsort(-gains_S, kind="stable")
    gains = [int(index) for index in order[: task.num_shown] if gains_S[index] > 0]
    losses = [int(index) for index in order[::-1][: task.num_shown] if gains_S[index] < 0]
    drawn = np.random.default_rng(task.seed).permutation(len(gains_S))[: task.num_shown]
    return {"gains": gains, "losses": losses, "random": sorted(int(index) for index in drawn)}


def _finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return float(value) if math.isfinite(value) else None
