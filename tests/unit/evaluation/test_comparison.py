"""Base against tuned model: the test and the interval of each metric, and the verdict."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from ingle.config import Source, TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation import SampleText, TaskResult, compare, summarize
from ingle.evaluation.scorers import Likelihood, MaskedTokens, Outputs, Prediction, make_scorer
from ingle.evaluation.statistics.significance import holm
from ingle.report.metrics import METRICS
from ingle.report.results import to_dict
from tests.stored_results import STORED

TEXT_METRICS = ("exact_match", "bleu", "chrf", "rouge_l", "perplexity", "bits_per_byte")


def make_task(*metrics: str, **options: Any) -> TaskConfig:
    return TaskConfig(sources=(Source(path="task.jsonl"),), metrics=metrics or TEXT_METRICS, **options)


def make_result(answers: list[str], targets: list[str], nll: float = 10.0) -> TaskResult:
    return TaskResult(
        samples=tuple(SampleText(f"task.jsonl:{i + 1}", f"question {i}", (t,)) for i, t in enumerate(targets)),
        outputs=Outputs(tuple(answers), tuple(Likelihood(nll + i % 3, 8, len(t)) for i, t in enumerate(targets))),
    )


def make_pair(num_both: int, num_tuned: int, num_base: int, num_neither: int) -> tuple[TaskResult, TaskResult]:
    cells = [(1, 1)] * num_both + [(0, 1)] * num_tuned + [(1, 0)] * num_base + [(0, 0)] * num_neither
    targets = [f"the answer number {index} is right" for index in range(len(cells))]
    base, tuned = (
        [target if cell[side] else f"no {i}" for i, (cell, target) in enumerate(zip(cells, targets, strict=True))]
        for side in (0, 1)
    )
    return make_result(base, targets, nll=20.0), make_result(tuned, targets, nll=10.0)


def with_likelihoods(result: TaskResult, *nlls: float) -> TaskResult:
    return replace(result, outputs=Outputs((), tuple(Likelihood(nll, 5, 20) for nll in nlls)))


def normalize(value: Any) -> Any:
    """The value without rounding errors and without sacrebleu's version."""
    if isinstance(value, dict):
        return {name: normalize(item) for name, item in value.items()}
    if isinstance(value, list):
        return [normalize(item) for item in value]
    if isinstance(value, str):
        return value.partition("|version")[0]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_figures_and_keys_are_those_of_version_0_1() -> None:
    base, tuned = make_pair(1, 4, 1, 1)
    task = make_task(answer_pattern=r"number (\d+)", num_shown=1)
    for name, result in (("comparison", compare(base, tuned, task)), ("summary", summarize(tuned, task))):
        assert json.dumps(normalize(to_dict(result))) == json.dumps(normalize(STORED[name]))


def test_every_metric_gets_the_test_of_its_kind() -> None:
    rows = compare(*make_pair(4, 30, 2, 4), make_task()).metrics
    assert list(rows) == list(TEXT_METRICS)
    assert rows["exact_match"].p == pytest.approx(binomtest(2, 32).pvalue)
    assert rows["exact_match"].test == "exact McNemar"
    assert rows["exact_match"].interval == "Newcombe paired score"
    for name in ("bleu", "chrf"):
        assert rows[name].p == pytest.approx(1 / 10_001)
        assert rows[name].p_exact < 1e-5
        assert "randomization" in rows[name].test and "version:" in rows[name].signature
    for name in ("rouge_l", "perplexity", "bits_per_byte"):
        assert rows[name].test == "exact sign-flip permutation"
        assert rows[name].p == rows[name].p_exact < 1e-5
    assert [row.p_holm for row in rows.values()] == holm([row.p for row in rows.values()])
    for row in rows.values():
        assert row.ci95[0] <= row.delta <= row.ci95[1]
        assert row.n == 40 == row.num_better + row.num_worse + row.num_equal
        assert row.delta == row.tuned - row.base
        assert row.outcome == "better"


def make_predicted_pair(name: str) -> tuple[TaskResult, TaskResult]:
    """Six samples that the base gets wrong and the tuned model right, as predictions of the right kind."""
    base, tuned = make_pair(0, 6, 0, 0)
    match METRICS[name].reads, name:
        case "masked", _:
            wrong, right = (
                Outputs(masked=(MaskedTokens(9.0, 0, 3),) * 6),
                Outputs(masked=(MaskedTokens(0.0, 3, 3),) * 6),
            )
            references = [("text",)] * 6
        case _, "reward":
            wrong, right = Outputs(rewards=(-1.0,) * 6), Outputs(rewards=(0.5, 1.0, 1.5) * 2)
            references = [("text",)] * 6
        case _, "pearson" | "spearman" | "mse":
            references = [(str(float(value)),) for value in range(6)]
            wrong, right = (
                Outputs(
                    predictions=tuple(Prediction(scores=(sign * value,)) for value in range(6)), problem="regression"
                )
                for sign in (-1.0, 1.0)
            )
        case _, "entity_f1" | "entity_f1_macro" | "tag_accuracy":
            names, references = ("O", "B-PER"), [("B-PER O",)] * 6
            wrong, right = (
                Outputs(predictions=(Prediction(tags),) * 6, label_names=names)
                for tags in (("O", "B-PER"), ("B-PER", "O"))
            )
        case _:
            names, references = ("no", "yes"), [("yes",), ("no",)] * 3
            rows = [Prediction((label,), logps) for label, logps in (("no", (-0.1, -2.4)), ("yes", (-2.4, -0.1)))]
            wrong = Outputs(predictions=(rows[0], rows[1]) * 3, label_names=names)
            right = Outputs(predictions=(rows[1], rows[0]) * 3, label_names=names)
    samples = tuple(replace(one, references=two) for one, two in zip(base.samples, references, strict=True))
    return replace(base, samples=samples, outputs=wrong), replace(tuned, samples=samples, outputs=right)


@pytest.mark.parametrize("name", METRICS)
def test_scorers_and_their_descriptions_agree(name: str) -> None:
    is_text = METRICS[name].reads in ("answers", "likelihoods")
    base, tuned = make_pair(0, 6, 0, 0) if is_text and name != "reward" else make_predicted_pair(name)
    metric = make_scorer(name, make_task(name)).metric
    assert metric is METRICS[name]
    row = compare(base, tuned, make_task(name)).metrics[name]  # the tuned model answers everything right
    assert (row.delta > 0) == metric.higher_is_better == row.higher_is_better
    assert min(row.base, row.tuned) >= metric.low
    if math.isfinite(metric.high):
        assert row.tuned == pytest.approx(metric.high)


def test_a_rise_of_a_likelihood_metric_is_worse() -> None:
    base, tuned = make_pair(0, 40, 0, 0)
    rows = compare(tuned, base, make_task("perplexity", "bits_per_byte")).metrics
    assert all(row.delta > 0 and row.outcome == "worse" and row.num_worse == 40 for row in rows.values())


def test_perplexity_is_tested_by_its_log_likelihoods() -> None:
    base, tuned = make_pair(0, 12, 0, 0)
    nlls = [9.0 + i for i in range(12)]
    base, tuned = with_likelihoods(base, *nlls), with_likelihoods(tuned, *(nll - 0.5 for nll in nlls))
    row = compare(base, tuned, make_task("perplexity")).metrics["perplexity"]
    assert row.base == pytest.approx(math.exp(sum(nlls) / 60))
    assert row.p == pytest.approx(2 / 2**12)


def test_equal_answers_are_no_difference() -> None:
    base, _ = make_pair(10, 0, 0, 10)
    result = compare(base, base, make_task())
    assert all(row.p == row.p_exact == row.p_holm == 1.0 for row in result.metrics.values())
    assert result.outcome == "unclear"
    assert "no significant difference" in result.verdict
    assert result.shown.gains == result.shown.losses == ()


def test_the_verdict_names_figures_outcome_and_doubts() -> None:
    result = compare(*make_pair(4, 30, 2, 4), make_task("exact_match"))
    assert result.headline == "exact_match"
    assert result.verdict.startswith("exact match 15.0 % → 85.0 %, +70.0 points [")
    assert result.verdict.endswith("n = 40: better.")
    few = compare(*make_pair(1, 2, 0, 1), make_task("exact_match"))
    assert "p = 0.500, n = 4: no significant difference. With fewer than 6 samples" in few.verdict
    assert compare(*make_pair(0, 0, 30, 0), make_task("exact_match")).verdict.endswith("worse.")
    assert compare(*make_pair(0, 4, 3, 0), make_task("rouge_l")).verdict.startswith("ROUGE-L 0.")


def test_the_verdict_names_the_correction_that_decides() -> None:
    # 7 against 0 discordant pairs: p = 2 / 2^7 = 0.0156, which Holm multiplies by the number of metrics.
    lost = make_pair(3, 7, 0, 10)
    assert compare(*lost, make_task("exact_match")).verdict.endswith("p = 0.016, n = 20: better.")
    same = lost[0].outputs.likelihoods
    base, tuned = (replace(side, outputs=Outputs(side.outputs.answers, same)) for side in lost)
    result = compare(base, tuned, make_task("exact_match", "perplexity", "bits_per_byte", "rouge_l"))
    assert result.metrics["exact_match"].p_holm == pytest.approx(4 / 64)
    _, _, judged = result.verdict.partition("p = 0.016, n = 20: ")
    assert judged.startswith("not significant after correction for 4 metrics (p = 0.062).")
    two = compare(base, tuned, make_task("exact_match", "perplexity"))
    assert two.verdict.endswith("n = 20: better (p = 0.031 after correction for 2 metrics).")


def test_the_floor_of_a_simulation_stays_a_bound_after_correction() -> None:
    result = compare(*make_pair(4, 30, 2, 4), make_task("chrf", "bleu"))
    assert "p ≤ 0.0001, n = 40: better (p ≤ 0.0002 after correction for 2 metrics)." in result.verdict


def test_shown_samples_are_gains_losses_and_a_random_draw() -> None:
    base, tuned = make_pair(3, 4, 5, 30)
    shown = compare(base, tuned, make_task("exact_match", num_shown=3)).shown
    assert shown.gains == (3, 4, 5)
    assert set(shown.losses) <= set(range(7, 12)) and len(shown.losses) == 3
    assert len(shown.random) == 3
    other = compare(base, tuned, make_task("exact_match", num_shown=3, seed=5)).shown
    assert other.random != shown.random and other.gains == shown.gains


def test_unparsed_answers_are_counted() -> None:
    base, tuned = make_pair(0, 5, 0, 5)
    row = compare(base, tuned, make_task("exact_match", answer_pattern=r"number (\d+)")).metrics["exact_match"]
    assert (row.unparsed.base, row.unparsed.tuned) == (10, 5)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_one_or_two_samples_give_strict_json(num_samples: int) -> None:
    result = compare(*make_pair(0, num_samples, 0, 0), make_task())
    json.dumps(to_dict(result), allow_nan=False)
    assert all(row.outcome == "unclear" for row in result.metrics.values())
    assert (result.metrics["chrf"].ci95 == (None, None)) == (num_samples == 1)


def test_an_overflowing_perplexity_gives_strict_json() -> None:
    base, tuned = make_pair(0, 5, 0, 0)
    result = compare(
        with_likelihoods(base, *[1e6] * 5),
        with_likelihoods(tuned, *[9.0] * 5),
        make_task("perplexity", "bits_per_byte"),
    )
    json.dumps(to_dict(result), allow_nan=False)
    assert result.metrics["perplexity"].base == pytest.approx(math.exp(100))
    assert result.outcome == "unclear"  # 5 samples: p = 2 / 2^5, whatever the difference


def test_samples_of_one_group_count_together() -> None:
    # 12 samples in 4 groups whose members always agree: as much evidence as 4 samples, not 12.
    base, tuned = make_pair(0, 12, 0, 0)
    base, tuned = (
        replace(side, samples=tuple(replace(sample, group=i // 3) for i, sample in enumerate(side.samples)))
        for side in (base, tuned)
    )
    rows = compare(base, tuned, make_task("exact_match", "chrf")).metrics
    assert rows["exact_match"].p == pytest.approx(2 / 2**4)
    assert rows["exact_match"].test == "exact sign-flip permutation of 4 groups"
    assert rows["exact_match"].interval.endswith("of 4 groups")
    assert rows["chrf"].p_exact == pytest.approx(2 / 2**4)
    assert rows["chrf"].p == pytest.approx(2 / 2**4, abs=0.01)
    assert rows["exact_match"].n == 12


def test_models_with_different_labels_cannot_be_compared() -> None:
    base, tuned = make_predicted_pair("accuracy")
    other = replace(tuned, outputs=replace(tuned.outputs, label_names=("no", "yes", "maybe")))
    with pytest.raises(EvaluationError, match="different labels"):
        compare(base, other, make_task("accuracy"))


def test_different_samples_cannot_be_compared() -> None:
    base, tuned = make_pair(2, 2, 2, 2)
    other = replace(tuned, samples=(*tuned.samples[:-1], SampleText("x", "other question", ("r",))))
    with pytest.raises(EvaluationError, match="different samples"):
        compare(base, other, make_task())


def test_a_summary_has_the_interval_of_one_model() -> None:
    base, _ = make_pair(9, 0, 0, 1)
    result = summarize(base, make_task("exact_match", "chrf", "bits_per_byte"))
    row = result.metrics["exact_match"]
    assert row.value == 0.9
    assert row.ci95 == pytest.approx([0.596, 0.982], abs=5e-4)
    assert result.samples[9].answer == "no 9"
    assert np.isfinite(result.metrics["chrf"].ci95).all()


def test_the_same_seed_gives_the_same_result() -> None:
    assert compare(*make_pair(4, 12, 6, 10), make_task()) == compare(*make_pair(4, 12, 6, 10), make_task())


def test_comparing_loads_no_torch() -> None:
    check = "import sys, ingle.evaluation; ingle.evaluation.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
