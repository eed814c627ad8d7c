"""BLEU and chrF by sacrebleu, with any number of references per sample."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import sacrebleu
from sacrebleu.metrics.base import Metric as SacreMetric

from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores
from ingle.evaluation.statistics import Floats
from ingle.report.metrics import METRICS

_MAX_ORDER = 4
_BETA_SQUARED = 4.0


class Bleu(Scorer):
    """Corpus BLEU, 0 to 100; the score of one sample is sentence BLEU with effective order.

    Words are split as in mteval-v13a. References written mostly without spaces get another tokenizer (``zh`` for
    Chinese, ``char`` for Japanese, Thai, Lao, Khmer and Burmese), because 13a would read a sentence as one word; the
    signature names it.

    Source: Papineni et al. 2002 (ACL, section 2); Post 2018, arXiv 1804.08771.
    """

    metric = METRICS["bleu"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the answers; the value equals sacrebleu's to the last digit."""
        tokenizer = choose_tokenizer(target for targets in references for target in targets)
        corpus = sacrebleu.BLEU(tokenize=tokenizer, force=True)
        sentence = sacrebleu.BLEU(tokenize=tokenizer, force=True, effective_order=True)
        return _scores(corpus, sentence, outputs.answers, references)

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the BLEU of summed statistics (answer length, reference length, 4 matches, 4 totals).

        Exponential smoothing: the k-th order without a match counts as 1 / (2^k total).
        """
        answer_len, reference_len = totals[..., 0], totals[..., 1]
        matches, counts = totals[..., 2 : 2 + _MAX_ORDER], totals[..., 2 + _MAX_ORDER :]
        missed = (matches == 0) & (counts > 0)
        smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_precision = np.log(100.0 * smoothed / counts)
            penalty = np.where(answer_len < reference_len, np.exp(1.0 - reference_len / answer_len), 1.0)
        score = penalty * np.exp(log_precision.sum(axis=-1) / _MAX_ORDER)
        nothing = (matches.sum(axis=-1) == 0) | (counts == 0).any(axis=-1)
        return np.where(nothing, 0.0, score)


class Chrf(Scorer):
    """Corpus chrF2 (F-score of character n-grams without white space), 0 to 100; a sample's score is its own chrF2.

    Source: Popović 2015 (WMT, section 2); Post 2018, arXiv 1804.08771.
    """

    metric = METRICS["chrf"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the answers; the value equals sacrebleu's to the last digit."""
        return _scores(sacrebleu.CHRF(), sacrebleu.CHRF(), outputs.answers, references)

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the chrF of summed statistics (6 orders x answer, reference and matching n-grams).

        Precision and recall are averaged over the orders that both sides have.
        """
        counts = totals.reshape(*totals.shape[:-1], -1, 3)
        answer, reference, matching = counts[..., 0], counts[..., 1], counts[..., 2]
        both = (answer > 0) & (reference > 0)
        num_orders = np.maximum(both.sum(axis=-1), 1)
        precision = np.where(both, matching / np.maximum(answer, 1), 0.0).sum(axis=-1) / num_orders
        recall = np.where(both, matching / np.maximum(reference, 1), 0.0).sum(axis=-1) / num_orders
        denominator = _BETA_SQUARED * precision + recall
        score = (1 + _BETA_SQUARED) * precision * recall / np.where(denominator > 0, denominator, 1.0)
        return np.where(denominator > 0, 100.0 * score, 0.0)


def _scores(corpus: SacreMetric, sentence: SacreMetric, answers: Sequence[str], references: References) -> Scores:
    """Scores by sacrebleu; ``sentence`` scores single samples.

    The statistics are integers, so their sums are exact. sacrebleu's significance tests read them by the same private
    method; there is no public one.
    """
    streams = _transpose(references)
    pairs = zip(answers, references, strict=True)
    return Scores(
        value=float(corpus.corpus_score(answers, streams).score),
        per_sample=np.array([sentence.sentence_score(answer, list(targets)).score for answer, targets in pairs]),
        statistics=np.array(corpus._extract_corpus_statistics(answers, streams), dtype=np.float64),
        signature=str(corpus.get_signature()),
    )


def _transpose(references: References) -> list[list[str]]:
    """Returns one list per reference position, as sacrebleu expects, instead of one per sample.

    Missing references are None, which sacrebleu ignores; an empty string would count as a reference of length 0 and
    change the closest reference length of BLEU.
    """
    longest = max(len(targets) for targets in references)
    padded = [[targets[k] if k < len(targets) else None for targets in references] for k in range(longest)]
    return cast("list[list[str]]", padded)  # sacrebleu accepts None, but its annotations do not say so


def choose_tokenizer(texts: Iterable[str]) -> str:
    """Returns sacrebleu's tokenizer for the script that most letters belong to."""
    letters = {"han": 0, "kana": 0, "unspaced": 0, "other": 0}
    for text in texts:
        if text.isascii():
            letters["other"] += len(text)
            continue
        for letter in text:
            if letter.isalpha():
                letters[_script(letter)] += 1
    unspaced = letters["han"] + letters["kana"] + letters["unspaced"]
    if unspaced <= letters["other"]:
        return "13a"
    return "zh" if letters["han"] > 10 * (letters["kana"] + letters["unspaced"]) else "char"


def _script(letter: str) -> str:
    if letter.isascii():
        return "other"
    name = unicodedata.name(letter, "")
    if name.startswith("CJK"):
        return "han"
    if name.startswith(("HIRAGANA", "KATAKANA")):
        return "kana"
    return "unspaced" if name.startswith(("THAI", "LAO", "KHMER", "MYANMAR")) else "other"
