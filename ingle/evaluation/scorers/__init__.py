"""Scorers, one file per family of metrics."""

from __future__ import annotations

from collections.abc import Callable

from ingle.config.evaluate import TaskConfig
from ingle.evaluation.scorers.exact_match import ExactMatch
from ingle.evaluation.scorers.ngrams import Bleu, Chrf
from ingle.evaluation.scorers.perplexity import BitsPerByte, Perplexity
from ingle.evaluation.scorers.rouge import RougeL
from ingle.evaluation.scorers.scorer import Likelihood, Outputs, Scorer, Scores

__all__ = ["Likelihood", "Outputs", "Scorer", "Scores", "make_scorer", "make_scorers"]

_SCORERS: dict[str, Callable[[TaskConfig], Scorer]] = {
    "exact_match": lambda task: ExactMatch(task.answer_pattern),
    "bleu": lambda task: Bleu(),
    "chrf": lambda task: Chrf(),
    "rouge_l": lambda task: RougeL(),
    "perplexity": lambda task: Perplexity(),
    "bits_per_byte": lambda task: BitsPerByte(),
}


def make_scorer(name: str, task: TaskConfig) -> Scorer:
    """Returns the scorer of one metric."""
    return _SCORERS[name](task)


def make_scorers(task: TaskConfig) -> list[Scorer]:
    """Returns the scorers of a task in the order given, each metric once."""
    return [make_scorer(name, task) for name in dict.fromkeys(task.metrics)]
