"""Scorers: one file for each family of metrics, one ``match`` that makes them."""

from __future__ import annotations

from typing import assert_never

from ingle.config.evaluate import MetricName, TaskConfig
from ingle.evaluation.scorers.base import Kind, Likelihood, Outputs, Scorer, Scores
from ingle.evaluation.scorers.bleu import Bleu
from ingle.evaluation.scorers.chrf import Chrf
from ingle.evaluation.scorers.exact_match import ExactMatch
from ingle.evaluation.scorers.likelihood import BitsPerByte, Perplexity
from ingle.evaluation.scorers.rouge_l import RougeL

__all__ = ["Kind", "Likelihood", "Outputs", "Scorer", "Scores", "make_scorer", "make_scorers"]


def make_scorer(name: MetricName, task: TaskConfig) -> Scorer:
    """The scorer of one metric."""
    match name:
        case "exact_match":
            return ExactMatch(task.answer_pattern)
        case "bleu":
            return Bleu()
        case "chrf":
            return Chrf()
        case "rouge_l":
            return RougeL()
        case "perplexity":
            return Perplexity()
        case "bits_per_byte":
            return BitsPerByte()
        case _:
            assert_never(name)


def make_scorers(task: TaskConfig) -> list[Scorer]:
    """The scorers of a task, each metric once, in the order given."""
    return [make_scorer(name, task) for name in dict.fromkeys(task.metrics)]
