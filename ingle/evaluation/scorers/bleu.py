"""BLEU as sacrebleu computes it: of the corpus, with any number of references for each segment."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import sacrebleu

from ingle.evaluation.scorers.base import Kind, Outputs, Scores
from ingle.evaluation.scorers.sacre import segment_scores, segment_statistics, streams
from ingle.evaluation.stats import Floats

_MAX_ORDER = 4


class Bleu:
    """Corpus BLEU, 0 to 100; the score of one sample is sentence BLEU with effective order.

    Words are split as mteval-v13a does.  References that are mostly written without spaces get another tokenizer
    (``zh`` for Chinese, ``char`` for Japanese, Thai, Lao, Khmer and Burmese), for under 13a a whole sentence would
    be one word; the signature names it.

    Source: Papineni et al. 2002 (ACL, section 2); Post 2018, arXiv 1804.08771.
    """

    name = "bleu"
    kind: Kind = "corpus"
    higher_is_better = True
    reads: Literal["answers", "likelihoods"] = "answers"

    def score(self, outputs: Outputs, references: Sequence[Sequence[str]]) -> Scores:
        """Scores the answers; the value is sacrebleu's to the last digit."""
        tokenizer = choose_tokenizer(target for targets in references for target in targets)
        corpus = sacrebleu.BLEU(tokenize=tokenizer, force=True)
        sentence = sacrebleu.BLEU(tokenize=tokenizer, force=True, effective_order=True)
        return Scores(
            value=float(corpus.corpus_score(outputs.answers, streams(references)).score),
            per_sample=segment_scores(sentence, outputs.answers, references),
            statistics=segment_statistics(corpus, outputs.answers, references),
            signature=str(corpus.get_signature()),
        )

    def aggregate(self, totals: Floats) -> Floats:
        """BLEU of summed statistics (answer length, reference length, 4 matches, 4 totals).

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


def choose_tokenizer(texts: Iterable[str]) -> str:
    """Gives sacrebleu's name of the tokenizer that suits the script most of the letters are in."""
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
