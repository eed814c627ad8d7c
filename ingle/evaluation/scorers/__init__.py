"""Scorers, one file per family of metrics."""

from __future__ import annotations

from collections.abc import Callable

from ingle.config.evaluate import TEXT_METRICS, TaskConfig
from ingle.evaluation.scorers.classes import Accuracy, ClassF1, LogLoss, Matthews
from ingle.evaluation.scorers.entities import EntityF1, TagAccuracy
from ingle.evaluation.scorers.exact_match import ExactMatch
from ingle.evaluation.scorers.masked import MaskedAccuracy, MaskedPerplexity
from ingle.evaluation.scorers.ngrams import Bleu, Chrf
from ingle.evaluation.scorers.perplexity import BitsPerByte, Perplexity
from ingle.evaluation.scorers.ranks import MeanSquaredError, Pearson, RocAuc, Spearman
from ingle.evaluation.scorers.rewards import Reward
from ingle.evaluation.scorers.rouge import RougeL
from ingle.evaluation.scorers.scorer import Likelihood, MaskedTokens, Outputs, Prediction, Problem, Scorer, Scores
from ingle.evaluation.scorers.squad import SquadExactMatch, SquadF1

__all__ = [
    "Likelihood",
    "MaskedTokens",
    "Outputs",
    "Prediction",
    "Problem",
    "Scorer",
    "Scores",
    "make_scorer",
    "make_scorers",
]

_SCORERS: dict[str, Callable[[TaskConfig], Scorer]] = {
    "exact_match": lambda task: ExactMatch(task.answer_pattern),
    "bleu": lambda task: Bleu(),
    "chrf": lambda task: Chrf(),
    "rouge_l": lambda task: RougeL(),
    "reward": lambda task: Reward(),
    "perplexity": lambda task: Perplexity(),
    "bits_per_byte": lambda task: BitsPerByte(),
    "accuracy": lambda task: Accuracy(),
    "f1_macro": lambda task: ClassF1("macro"),
    "f1_micro": lambda task: ClassF1("micro"),
    "f1_weighted": lambda task: ClassF1("weighted"),
    "matthews": lambda task: Matthews(),
    "log_loss": lambda task: LogLoss(),
    "roc_auc": lambda task: RocAuc(),
    "pearson": lambda task: Pearson(),
    "spearman": lambda task: Spearman(),
    "mse": lambda task: MeanSquaredError(),
    "tag_accuracy": lambda task: TagAccuracy(),
    "entity_f1": lambda task: EntityF1("micro", task.tag_scheme),
    "entity_f1_macro": lambda task: EntityF1("macro", task.tag_scheme),
    "squad_em": lambda task: SquadExactMatch(),
    "squad_f1": lambda task: SquadF1(),
    "masked_accuracy": lambda task: MaskedAccuracy(),
    "masked_perplexity": lambda task: MaskedPerplexity(),
}


def make_scorer(name: str, task: TaskConfig) -> Scorer:
    """Returns the scorer of one metric."""
    return _SCORERS[name](task)


def make_scorers(task: TaskConfig) -> list[Scorer]:
    """Returns the scorers of a task in the order given, each metric once."""
    return [make_scorer(name, task) for name in dict.fromkeys(task.metrics or TEXT_METRICS)]
