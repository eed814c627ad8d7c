"""Metrics of predictions against scikit-learn, scipy, brute force and published examples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from ingle.config import Source, TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation.scorers import MaskedTokens, Outputs, Prediction, Scores, make_scorer
from ingle.evaluation.scorers.squad import normalize
from ingle.evaluation.tag_schemes import Entity, find_entities

TASK = TaskConfig(sources=(Source(path="task.jsonl"),))
NAMES = tuple("abcdef")
close = pytest.approx


def score(name: str, outputs: Outputs, references: Any, **options: Any) -> Scores:
    return make_scorer(name, TASK.model_copy(update=options)).score(outputs, references)


def resampled(name: str, scores: Scores, times: np.ndarray) -> float:
    return float(make_scorer(name, TASK).replicate(scores.statistics, times[None].astype(float))[0])


def classifier(seed: int, num_samples: int = 60, num_labels: int = 4) -> tuple[np.ndarray, np.ndarray, Outputs, Any]:
    """True classes, probabilities (with ties), the outputs and the references."""
    rng = np.random.default_rng(seed)
    true = rng.permutation(np.arange(num_samples) % num_labels)
    logits = rng.normal(size=(num_samples, num_labels)) + np.eye(num_labels)[true]
    logits[::3] = logits[0]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predictions = tuple(Prediction((NAMES[int(row.argmax())],), tuple(np.log(row).tolist())) for row in probabilities)
    return (
        true,
        probabilities,
        Outputs(predictions=predictions, label_names=NAMES[:num_labels]),
        [(NAMES[label],) for label in true],
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_labels", [2, 5])
def test_classification_equals_scikit_learn(seed: int, num_labels: int) -> None:
    true, probabilities, outputs, references = classifier(seed, num_labels=num_labels)
    chosen = probabilities.argmax(1)
    ranked = probabilities[:, 1] if num_labels == 2 else probabilities
    expected = {
        "accuracy": sklearn.accuracy_score(true, chosen),
        "f1_macro": sklearn.f1_score(true, chosen, average="macro"),
        "f1_micro": sklearn.f1_score(true, chosen, average="micro"),
        "f1_weighted": sklearn.f1_score(true, chosen, average="weighted"),
        "matthews": sklearn.matthews_corrcoef(true, chosen),
        "log_loss": sklearn.log_loss(true, probabilities),
        "roc_auc": sklearn.roc_auc_score(true, ranked, multi_class="ovr"),
    }
    scores = {name: score(name, outputs, references) for name in expected}
    assert {name: found.value for name, found in scores.items()} == close(expected, abs=1e-12)
    # Multiplicities score drawn samples as if they had been collected.
    drawn = np.random.default_rng(seed).integers(0, len(true), len(true))
    times = np.bincount(drawn, minlength=len(true))
    again = {
        "f1_macro": sklearn.f1_score(true[drawn], chosen[drawn], average="macro"),
        "matthews": sklearn.matthews_corrcoef(true[drawn], chosen[drawn]),
        "log_loss": sklearn.log_loss(true[drawn], probabilities[drawn]),
        "roc_auc": sklearn.roc_auc_score(true[drawn], ranked[drawn], multi_class="ovr"),
    }
    assert {name: resampled(name, scores[name], times) for name in again} == close(again, abs=1e-12)


def test_classes_without_a_sample_are_left_out_as_by_scikit_learn() -> None:
    true, probabilities, outputs, references = classifier(0, num_samples=9, num_labels=3)
    outputs = Outputs(
        predictions=tuple(Prediction(row.labels, (*row.scores, -50.0)) for row in outputs.predictions),
        label_names=("a", "b", "c", "never"),
    )
    expected = sklearn.f1_score(true, probabilities.argmax(1), average="macro")
    assert score("f1_macro", outputs, references).value == close(expected, abs=1e-12)
    expected = sklearn.roc_auc_score(true, probabilities, multi_class="ovr")
    assert score("roc_auc", outputs, references).value == close(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_several_labels_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, probabilities = rng.random((40, 4)) < 0.4, rng.uniform(0.01, 0.99, (40, 4))
    if seed == 2:  # a label that no text has and no prediction: scikit-learn's macro F1 counts it as 0
        true[:, 3], probabilities[:, 3] = False, 0.1
    chosen = probabilities >= 0.5
    outputs = Outputs(
        predictions=tuple(
            Prediction(tuple(np.array(list("abcd"))[row >= 0.5]), tuple(np.log(row))) for row in probabilities
        ),
        label_names=tuple("abcd"),
        problem="multi",
    )
    references = [tuple(np.array(list("abcd"))[row]) for row in true]
    expected = {
        "accuracy": sklearn.accuracy_score(true, chosen),
        **{
            f"f1_{average}": sklearn.f1_score(true, chosen, average=average, zero_division=0)
            for average in ("macro", "micro", "weighted")
        },
        "log_loss": np.mean([sklearn.log_loss(true[:, c], probabilities[:, c], labels=[0, 1]) for c in range(4)]),
        "roc_auc": sklearn.roc_auc_score(true[:, :3], probabilities[:, :3], average="macro")
        if seed == 2
        else sklearn.roc_auc_score(true, probabilities, average="macro"),
    }
    found = {name: score(name, outputs, references) for name in expected}
    assert {name: scores.value for name, scores in found.items()} == close(expected, abs=1e-12)
    samples = [sklearn.f1_score(t, z, zero_division=1) for t, z in zip(true, chosen, strict=True)]
    assert found["f1_micro"].per_sample == close(np.array(samples), abs=1e-12)
    with pytest.raises(EvaluationError, match="several labels"):
        score("matthews", outputs, references)


def test_a_sure_mistake_costs_what_scikit_learn_charges() -> None:
    outputs = Outputs(predictions=(Prediction(("a",), (0.0, -800.0)),), label_names=("a", "b"))
    found = score("log_loss", outputs, [("b",)]).value
    assert found == close(sklearn.log_loss([1], [[1.0, 0.0]], labels=[0, 1]), abs=1e-9)


def regression(x: np.ndarray, y: np.ndarray) -> tuple[Outputs, Any]:
    outputs = Outputs(predictions=tuple(Prediction(scores=(value,)) for value in x), problem="regression")
    return outputs, [(repr(float(value)),) for value in y]


@pytest.mark.parametrize("seed", range(4))
def test_correlations_equal_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=50), 1)
    y = np.round(x + rng.normal(size=50), 1) + 1e6  # far from 0, and with ties
    outputs, references = regression(x, y)
    drawn = rng.integers(0, 50, 50)
    times = np.bincount(drawn, minlength=50)
    for name, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        scores = score(name, outputs, references)
        assert scores.value == close(reference(x, y)[0], abs=1e-9)
        assert scores.per_sample.mean() == close(scores.value, abs=1e-9)
        assert resampled(name, scores, times) == close(reference(x[drawn], y[drawn])[0], abs=1e-9)
    assert score("mse", outputs, references).value == close(sklearn.mean_squared_error(y, x))
    constant, _ = regression(np.full(50, 0.1), y)
    assert score("pearson", constant, references).value == score("spearman", constant, references).value == 0.0


def test_swapping_outputs_is_counting_them_elsewhere() -> None:
    rng = np.random.default_rng(1)
    true = rng.random(30) < 0.4
    base, tuned = rng.normal(size=30) + true, rng.normal(size=30) + 2 * true
    pooled = np.stack((np.concatenate((base, tuned)), np.tile(true, 2)), axis=1).astype(float)
    swapped = rng.integers(0, 2, (8, 30)).astype(float)
    found = make_scorer("roc_auc", TASK).replicate(pooled, np.concatenate((1 - swapped, swapped), axis=1))
    assert found == close([sklearn.roc_auc_score(true, np.where(row == 1, tuned, base)) for row in swapped])


def test_a_reference_that_is_no_label_is_an_error_with_a_guess() -> None:
    outputs = Outputs(predictions=(Prediction(("positive",), (-0.1, -2.0)),), label_names=("positive", "negative"))
    with pytest.raises(EvaluationError, match="'postive' is not one of the model's") as error:
        score("accuracy", outputs, [("postive",)])
    assert "did you mean 'positive'?" in str(error.value)
    with pytest.raises(EvaluationError, match="predicts none"):
        score("accuracy", Outputs(predictions=(Prediction(),)), [("x",)])
    with pytest.raises(EvaluationError, match="'high' is not a number"):
        score("mse", regression(np.ones(1), np.ones(1))[0], [("high",)])


#: How an entity of one word, and the first, inner and last word of a longer one, are tagged.
_PREFIXES = {"iob2": "BBII", "ioe2": "EIIE", "iobes": "SBIE", "bilou": "UBIL"}
_PATTERNS = {"iob2": "BI*", "ioe2": "I*E", "iobes": "BI*E|S", "bilou": "BI*L|U"}


def draw_tags(rng: np.random.Generator, prefixes: str) -> list[str]:
    return [
        "O" if rng.random() < 0.3 else f"{rng.choice(list(prefixes))}-{rng.choice(['PER', 'LOC', 'A-B'])}"
        for _ in range(rng.integers(1, 12))
    ]


@pytest.mark.parametrize("scheme", _PREFIXES)
def test_strict_schemes_equal_a_regular_expression(scheme: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(400):
        tags = draw_tags(rng, "".join(sorted(set(_PREFIXES[scheme]))))
        expected, place = [], 0
        while place < len(tags):  # the longest run of one type that the pattern matches
            run = place
            while run < len(tags) and tags[run] != "O" and tags[run][2:] == tags[place][2:]:
                run += 1
            found = re.match(_PATTERNS[scheme], "".join(tag[0] for tag in tags[place:run]))
            if found:
                expected.append(Entity(tags[place][2:], place, place + found.end() - 1))
            place += found.end() if found else 1
        assert find_entities(tags, scheme) == expected, tags


@pytest.mark.parametrize("scheme", [*_PREFIXES, "iob1", "ioe1"])
def test_entities_survive_their_encoding(scheme: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        entities, tags = [], []
        for _ in range(rng.integers(0, 5)):
            tags += ["O"] * int(rng.integers(0, 3))
            kind, length = str(rng.choice(["PER", "LOC"])), int(rng.integers(1 + (scheme == "ioe1"), 4))
            previous = entities[-1] if entities else None
            touches = previous is not None and previous.last == len(tags) - 1 and previous.kind == kind
            if scheme in _PREFIXES:
                one, first, inner, last = _PREFIXES[scheme]
                prefixes = one if length == 1 else first + inner * (length - 2) + last
            else:
                prefixes = "I" * length
                if touches and scheme == "iob1":
                    prefixes = "B" + "I" * (length - 1)
                elif touches:
                    tags[-1] = f"E-{kind}"
            entities.append(Entity(kind, len(tags), len(tags) + length - 1))
            tags += [f"{prefix}-{kind}" for prefix in prefixes]
        assert find_entities(tags, scheme) == entities, tags
        if scheme in ("iob1", "iob2", "iobes"):
            assert find_entities(tags) == entities, tags


def test_lenient_reading_takes_what_no_scheme_allows() -> None:
    tags = ["I-PER", "I-PER", "I-LOC", "O", "I-LOC", "B-LOC", "I-PER"]
    kinds = [("PER", 0, 1), ("LOC", 2, 2), ("LOC", 4, 4), ("LOC", 5, 5), ("PER", 6, 6)]
    assert find_entities(tags) == [Entity(*entity) for entity in kinds]
    assert find_entities(tags, "iob2") == [Entity("LOC", 5, 5)]
    with pytest.raises(EvaluationError, match="iob2 has no tag 'S-LOC'"):
        find_entities(["S-LOC"], "iob2")


def test_entity_f1_of_the_textbook() -> None:
    # The example of seqeval's documentation: one of two entities has a wrong border.
    true = [("O O O B-MISC I-MISC I-MISC O",), ("B-PER I-PER O",)]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    names = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER")
    outputs = Outputs(predictions=tuple(Prediction(tuple(tags)) for tags in found), label_names=names)
    micro, macro = (score(name, outputs, true) for name in ("entity_f1", "entity_f1_macro"))
    assert (micro.value, macro.value) == (0.5, 0.5)
    assert micro.per_sample.tolist() == [0.0, 1.0]
    assert score("tag_accuracy", outputs, true).value == close(0.8)
    # More entities of one type move the micro average only: micro 2*3/(4+4), macro mean of 0 and 1.
    outputs = Outputs(predictions=(*outputs.predictions, *outputs.predictions[1:] * 2), label_names=names)
    micro, macro = (score(name, outputs, [*true, *true[1:] * 2]) for name in ("entity_f1", "entity_f1_macro"))
    assert (micro.value, macro.value) == (0.75, 0.5)
    with pytest.raises(EvaluationError, match="needs a tag for every word"):
        score("entity_f1", outputs, [("O",)] * 4)


def test_squad_scores_follow_the_official_script() -> None:
    assert normalize("The  cat's (a) dog, An apple.") == "cats dog apple"
    cases: list[tuple[str, tuple[str, ...], float, float]] = [
        ("the Cat", ("cat", "dog"), 1.0, 1.0),
        ("big red cat", ("red cat",), 0.0, 0.8),
        ("", ("",), 1.0, 1.0),
        ("something", ("",), 0.0, 0.0),
        ("", ("a cat",), 0.0, 0.0),
        ("", ("the", "cat"), 0.0, 0.0),  # of "the" nothing is left, so only "cat" counts
        ("cat cat", ("cat",), 0.0, 2 / 3),
    ]
    outputs, references = Outputs(answers=tuple(case[0] for case in cases)), [case[1] for case in cases]
    assert score("squad_em", outputs, references).per_sample.tolist() == [case[2] for case in cases]
    assert score("squad_f1", outputs, references).per_sample == close([case[3] for case in cases])


def test_masked_tokens_weigh_equally() -> None:
    outputs = Outputs(masked=(MaskedTokens(2.0, 1, 1), MaskedTokens(4.0, 1, 3), MaskedTokens(0.0, 0, 0)))
    assert score("masked_accuracy", outputs, [("",)] * 3).value == 0.5
    assert score("masked_perplexity", outputs, [("",)] * 3).value == close(math.exp(1.5))


@pytest.mark.parametrize("name", ["roc_auc", "f1_macro", "matthews"])
def test_bootstrap_of_ranks_and_classes_equals_collected_samples(name: str) -> None:
    from ingle.evaluation.statistics.intervals import bootstrap

    true, probabilities, outputs, references = classifier(2, num_samples=80, num_labels=2)
    scores = score(name, outputs, references)
    chosen = probabilities.argmax(1)
    reference: Callable[..., float] = {
        "roc_auc": lambda rows: sklearn.roc_auc_score(true[rows], probabilities[rows, 1]),
        "f1_macro": lambda rows: sklearn.f1_score(true[rows], chosen[rows], average="macro"),
        "matthews": lambda rows: sklearn.matthews_corrcoef(true[rows], chosen[rows]),
    }[name]
    scorer = make_scorer(name, TASK)
    found = bootstrap(lambda times: scorer.replicate(scores.statistics, times), 80, seed=1)
    rng = np.random.default_rng(5)
    drawn = [reference(rng.integers(0, 80, 80)) for _ in range(300)]
    assert found.stderr == close(np.std(drawn), rel=0.15)
    assert found.low < scores.value < found.high
