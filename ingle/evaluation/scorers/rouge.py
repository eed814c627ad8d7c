"""ROUGE-L: F-measure of the longest common subsequence of words.

On ASCII text it equals rouge_score 0.1.2 (``rougeL``, no stemmer). That implementation drops all other letters
(Japanese scores 0 against itself, "Zürich" is read as "z rich"), so here words are runs of Unicode letters and digits,
and each letter of a script without spaces is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, mean_scores
from ingle.report.metrics import METRICS

_ASCII_WORD = re.compile("[a-z0-9]+")

# Thai and Lao, Burmese, Khmer, kana, Han with its extensions: written without spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class RougeL(Scorer):
    """Mean ROUGE-L F-measure, 0 to 1; of several references the best one counts.

    Source: Lin 2004 (ACL workshop Text Summarization Branches Out, section 3.1).
    """

    metric = METRICS["rouge_l"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores each answer against its closest reference."""
        pairs = zip(outputs.answers, references, strict=True)
        best = [max(f_measure(tokenize(target), tokenize(answer)) for target in targets) for answer, targets in pairs]
        return mean_scores(best, "f:1|case:lower|stem:no|tok:unicode-words|refs:max")


def tokenize(text: str) -> list[str]:
    """Returns lower-case words: letters, digits and their marks; all other characters separate words."""
    text = unicodedata.normalize("NFC", text).lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    kept = "".join(letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in text)
    return _UNSPACED.sub(r" \g<0> ", kept).split()


def f_measure(target: Sequence[str], answer: Sequence[str]) -> float:
    """Returns the harmonic mean of the common subsequence's share of the answer and of the target."""
    if not target or not answer:
        return 0.0
    ids: dict[str, int] = {}
    target_ids = [ids.setdefault(word, len(ids)) for word in target]
    answer_ids = [ids.setdefault(word, len(ids)) for word in answer]
    common = LCSseq.similarity(target_ids, answer_ids)
    precision, recall = common / len(answer), common / len(target)
    return 2 * precision * recall / (precision + recall) if common else 0.0
