"""Base against tuned: which test and interval a metric gets, and what the report says of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from ingle.config import Source, TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation import Question, TaskResult, compare, summarize
from ingle.evaluation.scorers import Likelihood, Outputs
from ingle.evaluation.statistics.significance import holm

ALL = ("exact_match", "bleu", "chrf", "rouge_l", "perplexity", "bits_per_byte")


def task(*metrics: str, **options) -> TaskConfig:
    return TaskConfig(sources=(Source(path="task.jsonl"),), metrics=metrics or ALL, **options)


def result(answers: list[str], targets: list[str], nll: float = 10.0) -> TaskResult:
    return TaskResult(
        samples=tuple(Question(f"task.jsonl:{i + 1}", f"question {i}", (t,)) for i, t in enumerate(targets)),
        outputs=Outputs(tuple(answers), tuple(Likelihood(nll + i % 3, 8, len(t)) for i, t in enumerate(targets))),
    )


def pair(num_both: int, num_tuned: int, num_base: int, num_neither: int) -> tuple[TaskResult, TaskResult]:
    cells = [(1, 1)] * num_both + [(0, 1)] * num_tuned + [(1, 0)] * num_base + [(0, 0)] * num_neither
    targets = [f"the answer number {index} is right" for index in range(len(cells))]
    answers = [
        [
            target if cell[side] else f"no {index}"
            for index, (cell, target) in enumerate(zip(cells, targets, strict=True))
        ]
        for side in (0, 1)
    ]
    return result(answers[0], targets, nll=20.0), result(answers[1], targets, nll=10.0)


def test_every_metric_gets_the_test_of_its_kind():
    report = compare(*pair(4, 30, 2, 4), task())
    rows = report["metrics"]
    assert list(rows) == list(ALL)
    assert rows["exact_match"]["p"] == pytest.approx(binomtest(2, 32).pvalue)
    assert rows["exact_match"]["test"] == "exact McNemar"
    assert rows["exact_match"]["interval"] == "Newcombe paired score"
    for name in ("bleu", "chrf"):
        assert rows[name]["p"] == pytest.approx(1 / 10_001)
        assert rows[name]["p_exact"] < 1e-5
        assert "randomization" in rows[name]["test"] and "version:" in rows[name]["signature"]
    for name in ("rouge_l", "perplexity", "bits_per_byte"):
        assert rows[name]["test"] == "exact sign-flip permutation"
        assert rows[name]["p"] == rows[name]["p_exact"] < 1e-5
    assert [row["p_holm"] for row in rows.values()] == holm([row["p"] for row in rows.values()])
    for row in rows.values():
        assert row["ci95"][0] <= row["delta"] <= row["ci95"][1]
        assert row["n"] == 40 == row["num_better"] + row["num_worse"] + row["num_equal"]
        assert row["delta"] == row["tuned"] - row["base"]
        assert row["outcome"] == "better"


def test_lower_is_better_for_likelihoods():
    base, tuned = pair(0, 40, 0, 0)
    rows = compare(tuned, base, task("perplexity", "bits_per_byte"))["metrics"]
    assert all(row["delta"] > 0 and row["outcome"] == "worse" and row["num_worse"] == 40 for row in rows.values())


def test_perplexity_is_tested_by_its_log_likelihoods():
    base, tuned = pair(0, 12, 0, 0)
    base = replace(base, outputs=Outputs((), tuple(Likelihood(9.0 + i, 5, 20) for i in range(12))))
    tuned = replace(tuned, outputs=Outputs((), tuple(Likelihood(8.5 + i, 5, 20) for i in range(12))))
    row = compare(base, tuned, task("perplexity"))["metrics"]["perplexity"]
    assert row["base"] == pytest.approx(math.exp(sum(9.0 + i for i in range(12)) / 60))
    assert row["p"] == pytest.approx(2 / 2**12)


def test_the_same_answers_are_no_difference():
    base, _ = pair(10, 0, 0, 10)
    report = compare(base, base, task())
    assert all(row["p"] == row["p_exact"] == row["p_holm"] == 1.0 for row in report["metrics"].values())
    assert report["outcome"] == "unclear"
    assert "no significant difference" in report["verdict"]
    assert report["shown"]["gains"] == report["shown"]["losses"] == []


def test_the_verdict_is_one_honest_sentence():
    report = compare(*pair(4, 30, 2, 4), task("exact_match"))
    assert report["headline"] == "exact_match"
    assert report["verdict"].startswith("exact match 15.0 % → 85.0 %, +70.0 points [")
    assert report["verdict"].endswith("n = 40: better.")
    few = compare(*pair(1, 2, 0, 1), task("exact_match"))
    assert "p = 0.500, n = 4: no significant difference. With fewer than 6 samples" in few["verdict"]
    assert compare(*pair(0, 0, 30, 0), task("exact_match"))["verdict"].endswith("worse.")


def test_the_verdict_names_the_correction_it_rests_on():
    # 7 against 0 discordant pairs: p = 2 / 2^7 = 0.0156, which Holm multiplies by the number of metrics.
    lost = pair(3, 7, 0, 10)
    alone = compare(*lost, task("exact_match"))["verdict"]
    assert alone.endswith("p = 0.016, n = 20: better.")
    base, tuned = (replace(side, outputs=Outputs(side.outputs.answers, lost[0].outputs.likelihoods)) for side in lost)
    four = task("exact_match", "perplexity", "bits_per_byte", "rouge_l")
    report = compare(base, tuned, four)
    assert report["metrics"]["exact_match"]["p_holm"] == pytest.approx(4 / 64)
    assert (
        report["verdict"]
        .split("p = 0.016, n = 20: ")[1]
        .startswith("not significant after correction for 4 metrics (p = 0.062).")
    )
    two = compare(base, tuned, task("exact_match", "perplexity"))
    assert two["verdict"].endswith("n = 20: better (p = 0.031 after correction for 2 metrics).")


def test_the_floor_of_a_simulation_stays_a_bound_after_correction():
    report = compare(*pair(4, 30, 2, 4), task("chrf", "bleu"))
    assert "p ≤ 0.0001, n = 40: better (p ≤ 0.0002 after correction for 2 metrics)." in report["verdict"]


def test_shown_samples_are_gains_losses_and_a_blind_draw():
    base, tuned = pair(3, 4, 5, 30)
    shown = compare(base, tuned, task("exact_match", num_shown=3))["shown"]
    assert shown["gains"] == [3, 4, 5]
    assert set(shown["losses"]) <= set(range(7, 12)) and len(shown["losses"]) == 3
    assert len(shown["random"]) == 3
    other = compare(base, tuned, task("exact_match", num_shown=3, seed=5))["shown"]
    assert other["random"] != shown["random"] and other["gains"] == shown["gains"]


def test_samples_hold_both_answers_and_their_scores():
    report = compare(*pair(1, 1, 0, 0), task("exact_match", "chrf"))
    sample = report["samples"][1]
    assert sample["prompt"] == "question 1" and sample["origin"] == "task.jsonl:2"
    assert (sample["base"], sample["tuned"]) == ("no 1", "the answer number 1 is right")
    assert sample["scores"]["exact_match"] == {"base": 0.0, "tuned": 1.0}
    assert sample["scores"]["chrf"]["tuned"] == pytest.approx(100.0)


def test_unparsed_answers_are_counted():
    base, tuned = pair(0, 5, 0, 5)
    row = compare(base, tuned, task("exact_match", answer_pattern=r"number (\d+)"))["metrics"]["exact_match"]
    assert row["unparsed"] == {"base": 10, "tuned": 5}


@pytest.mark.parametrize("num_samples", [1, 2])
def test_hardly_any_samples_still_give_strict_json(num_samples):
    report = compare(*pair(0, num_samples, 0, 0), task())
    json.dumps(report, allow_nan=False)
    assert all(row["outcome"] == "unclear" for row in report["metrics"].values())
    assert (report["metrics"]["chrf"]["ci95"] == [None, None]) == (num_samples == 1)


def test_a_hopeless_perplexity_still_gives_strict_json():
    base, tuned = pair(0, 5, 0, 0)
    hopeless = replace(base, outputs=Outputs((), tuple(Likelihood(1e6, 5, 20) for _ in range(5))))
    tuned = replace(tuned, outputs=Outputs((), tuple(Likelihood(9.0, 5, 20) for _ in range(5))))
    report = compare(hopeless, tuned, task("perplexity", "bits_per_byte"))
    json.dumps(report, allow_nan=False)
    assert report["metrics"]["perplexity"]["base"] == pytest.approx(math.exp(100))
    assert report["outcome"] == "unclear"  # 5 samples: p = 2 / 2^5, whatever the difference


def test_other_samples_cannot_be_compared():
    base, tuned = pair(2, 2, 2, 2)
    other = replace(tuned, samples=(*tuned.samples[:-1], Question("x", "other question", ("r",))))
    with pytest.raises(EvaluationError, match="different samples"):
        compare(base, other, task())


def test_a_result_survives_the_disk():
    base, _ = pair(2, 2, 2, 2)
    assert TaskResult.from_dict(json.loads(json.dumps(base.to_dict()))) == base


def test_one_model_alone():
    base, _ = pair(9, 0, 0, 1)
    report = summarize(base, task("exact_match", "chrf", "bits_per_byte"))
    row = report["metrics"]["exact_match"]
    assert row["value"] == 0.9
    assert row["ci95"] == pytest.approx([0.596, 0.982], abs=5e-4)
    assert report["samples"][9]["answer"] == "no 9"
    assert np.isfinite(report["metrics"]["chrf"]["ci95"]).all()
    json.dumps(report, allow_nan=False)


def test_the_same_seed_gives_the_same_report():
    assert compare(*pair(4, 12, 6, 10), task()) == compare(*pair(4, 12, 6, 10), task())
