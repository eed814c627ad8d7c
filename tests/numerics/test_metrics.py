"""Metrics against sacrebleu, rouge_score and golden values."""

from __future__ import annotations

import csv
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest

from ingle.evaluation.scorers import Likelihood, Outputs
from ingle.evaluation.scorers.ngrams import Bleu, Chrf, choose_tokenizer
from ingle.evaluation.scorers.perplexity import BitsPerByte, Perplexity
from ingle.evaluation.scorers.rouge import RougeL, f_measure, tokenize
from ingle.evaluation.statistics.significance import randomization

ANSWERS = ("The cat sat on the mat.", "It is raining cats and dogs today.", "He go to school by bus")
TARGETS = (("The cat is on the mat.",), ("It rains heavily today.",), ("He goes to school by bus.",))


def corpus(num_segments: int, seed: int, max_references: int = 3):
    """Segments with one to three references and answers of every quality, empty and identical ones among them."""
    rng = random.Random(seed)
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "in", "house,", "very", "quick.", "fox's", "£20", "Café"]
    answers, references = [], []
    for index in range(num_segments):
        targets = [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(rng.randint(1, max_references))]
        answer = targets[0].split()
        for place in range(len(answer)):
            if rng.random() < 0.4:
                answer[place] = rng.choice(words)
        answers.append("" if index % 17 == 5 else " ".join(answer))
        references.append(tuple(targets))
    return tuple(answers), tuple(references)


def padded(references):
    longest = max(map(len, references))
    return [[targets[k] if k < len(targets) else None for targets in references] for k in range(longest)]


def test_golden_values_of_the_reference():
    outputs = Outputs(answers=ANSWERS)
    bleu, chrf = Bleu().score(outputs, TARGETS), Chrf().score(outputs, TARGETS)
    assert bleu.value == 33.875516543640984
    assert chrf.value == 54.52165308863365
    assert bleu.per_sample == pytest.approx([48.8923, 12.2231, 45.4802], abs=1e-4)
    assert chrf.per_sample == pytest.approx([67.1727, 30.4433, 70.8264], abs=1e-4)
    assert bleu.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert chrf.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize("seed", range(6))
def test_corpus_scores_equal_sacrebleu_with_unequal_numbers_of_references(seed):
    answers, references = corpus(60, seed)
    outputs = Outputs(answers=answers)
    assert Bleu().score(outputs, references).value == sacrebleu.corpus_bleu(list(answers), padded(references)).score
    assert Chrf().score(outputs, references).value == sacrebleu.corpus_chrf(list(answers), padded(references)).score


def test_corpus_scores_equal_the_sacrebleu_command(tmp_path):
    answers, references = corpus(30, seed=9, max_references=1)
    (tmp_path / "answers").write_text("\n".join(answers) + "\n", encoding="utf-8")
    (tmp_path / "references").write_text("\n".join(t[0] for t in references) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "references"), "-i", str(tmp_path / "answers")]
    printed = subprocess.run(
        [*command, "-m", "bleu", "chrf", "-b", "-w", "10"], capture_output=True, text=True, check=True
    ).stdout
    outputs = Outputs(answers=answers)
    ours = [Bleu().score(outputs, references).value, Chrf().score(outputs, references).value]
    theirs = [float(line.strip(" ,[]")) for line in printed.split() if line.strip(" ,[]")]
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("scorer", [Bleu(), Chrf()], ids=["bleu", "chrf"])
@pytest.mark.parametrize("size", [1, 2, 3, 200])
def test_aggregate_of_any_subset_equals_sacrebleu(scorer, size):
    # Small subsets reach the smoothing of missing orders, empty answers and the brevity penalty.
    answers, references = corpus(200, seed=21)
    statistics = scorer.score(Outputs(answers=answers), references).statistics
    rng = np.random.default_rng(0)
    metric = sacrebleu.BLEU(force=True) if scorer.metric.name == "bleu" else sacrebleu.CHRF()
    subsets = [rng.choice(200, size=size, replace=size < 200) for _ in range(60 if size < 200 else 12)]
    found = scorer.aggregate(np.stack([statistics[subset].sum(0) for subset in subsets]))
    expected = [
        metric.corpus_score([answers[i] for i in subset], padded([references[i] for i in subset])).score
        for subset in subsets
    ]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert min(expected) != max(expected) or size == 200


@pytest.mark.parametrize("scorer", [Bleu(), Chrf()], ids=["bleu", "chrf"])
def test_randomization_agrees_with_sacrebleus_paired_test(scorer):
    tuned, references = corpus(40, seed=2)
    rng = random.Random(3)
    base = tuple(
        " ".join(word for word in answer.split() if rng.random() > (0.15 if index % 2 else 0.0))
        for index, answer in enumerate(tuned)
    )
    name = "BLEU" if scorer.metric.name == "bleu" else "chrF2"
    metric = sacrebleu.BLEU(force=True) if scorer.metric.name == "bleu" else sacrebleu.CHRF()
    named = [("base", list(base)), ("tuned", list(tuned))]
    _, scores = PairedTest(named, {name: metric}, padded(references), "ar", n_samples=4000)()
    expected = scores[name][1].p_value
    ours = [scorer.score(Outputs(answers=answers), references) for answers in (base, tuned)]
    pooled = np.concatenate([scores.statistics for scores in ours])
    p = randomization(lambda times: scorer.replicate(pooled, times), 40, num_trials=4000, seed=1)
    assert p == pytest.approx(expected, abs=5 * math.sqrt(max(expected * (1 - expected), 1e-3) / 4000))


def test_identical_systems_are_not_different():
    answers, references = corpus(40, seed=2)
    scores = Chrf().score(Outputs(answers=answers), references)
    pooled = np.concatenate([scores.statistics] * 2)
    assert randomization(lambda times: Chrf().replicate(pooled, times), 40, num_trials=100) == 1.0


@pytest.mark.parametrize("scorer", [Bleu(), Chrf(), RougeL()], ids=["bleu", "chrf", "rouge_l"])
def test_empty_answers_and_empty_references(scorer):
    scores = scorer.score(Outputs(answers=("", "", "word")), (("some text",), ("",), ("",)))
    assert scores.value == 0.0
    assert scores.per_sample.tolist() == [0.0, 0.0, 0.0]
    assert float(scorer.aggregate(scores.statistics.sum(0)[None])[0]) == 0.0
    perfect = scorer.score(Outputs(answers=("a b c d e", "")), (("a b c d e", "x"), ("a b c d e",)))
    assert 0 < perfect.value < 100


def test_bleu_takes_a_tokenizer_that_suits_the_script():
    assert choose_tokenizer(["The café is open."]) == "13a"
    assert choose_tokenizer(["今天天气很好。", "我们去公园散步。"]) == "zh"
    assert choose_tokenizer(["今日はとても良い天気です。"]) == "char"
    assert choose_tokenizer(["오늘은 날씨가 아주 좋습니다."]) == "13a"
    scores = Bleu().score(Outputs(answers=("今天天气很好,我们走吧。",)), (("今天天气很好,我们回家。",),))
    assert 30 < scores.value < 100
    assert "tok:zh" in scores.signature


def test_rouge_l_golden_values():
    target = "The quick brown fox jumps over the lazy dog.\nIt was running quickly."
    answer = "The quick brown dog jumped on the log.\nIt ran quickly."
    scores = RougeL().score(Outputs(answers=(answer,)), ((target,),))
    assert scores.value == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_rouge_l_equals_rouge_score(seed):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    answers, references = corpus(80, seed)
    scores = RougeL().score(Outputs(answers=answers), references)
    expected = [
        scorer.score_multi(list(targets), answer)["rougeL"].fmeasure
        for answer, targets in zip(answers, references, strict=True)
    ]
    assert scores.per_sample == pytest.approx(expected, abs=1e-12)


def test_rouge_l_against_the_textbook_recurrence():
    rng = random.Random(0)
    for _ in range(50):
        one, other = (rng.choices("abcde", k=rng.randint(1, 12)) for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, j in ((i, j) for i in range(len(one)) for j in range(len(other))):
            same = one[i] == other[j]
            table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
        common = table[-1][-1]
        expected = 2 * common / (len(one) + len(other))
        assert f_measure(one, other) == pytest.approx(expected, abs=1e-12)


def test_rouge_words_are_unicode():
    assert tokenize("Café naïve Zürich, don't_stop 3.5") == ["café", "naïve", "zürich", "don", "t", "stop", "3", "5"]
    assert tokenize("Cafe\u0301") == ["café"]
    assert tokenize("日本語です。OK") == ["日", "本", "語", "で", "す", "ok"]
    assert tokenize("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert RougeL().score(Outputs(answers=("日本語",)), (("日本語",),)).value == 1.0


def test_perplexity_and_bits_per_byte_golden_values():
    # (LL, tokens, bytes) of the reference: corpus ratios, never means of texts' own ratios.
    outputs = Outputs(likelihoods=(Likelihood(12.0, 10, 40), Likelihood(90.0, 60, 230)))
    perplexity, bits = Perplexity().score(outputs, ()), BitsPerByte().score(outputs, ())
    assert perplexity.value == pytest.approx(4.2937, abs=5e-5)
    assert bits.value == pytest.approx(0.54502, abs=5e-6)
    assert perplexity.per_sample == pytest.approx([math.exp(1.2), math.exp(1.5)])
    assert bits.per_sample == pytest.approx([12 / 40 / math.log(2), 90 / 230 / math.log(2)])


def test_real_restaurant_descriptions(shared_data):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    by_prompt: dict[str, list[str]] = {}
    with (shared_data / "e2e" / "testset_w_refs.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            by_prompt.setdefault(row["mr"], []).append(row["ref"])
    groups = [targets for targets in by_prompt.values() if len(targets) > 1][:150]
    answers, references = tuple(targets[0] for targets in groups), tuple(tuple(t[1:]) for t in groups)
    outputs = Outputs(answers=answers)
    assert len({len(targets) for targets in references}) > 1
    assert Bleu().score(outputs, references).value == sacrebleu.corpus_bleu(list(answers), padded(references)).score
    assert Chrf().score(outputs, references).value == sacrebleu.corpus_chrf(list(answers), padded(references)).score
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    expected = np.mean(
        [
            scorer.score_multi(list(targets), answer)["rougeL"].fmeasure
            for answer, targets in zip(answers, references, strict=True)
        ]
    )
    assert RougeL().score(outputs, references).value == pytest.approx(expected, abs=1e-12)
