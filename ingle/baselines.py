"""What a trained model is compared with: its base, or what predicts without a trained head.

A language model is compared with itself before training. A new head has no such base. A classifier is compared with
the most frequent class, and with the answer of its base where it can be asked by a prompt; a tagger with the most
frequent tag of each word; a finder of answers with the sentence that shares most words with the question; a reward
model with a rule that reads the lengths of the answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ingle import data, evaluation, models
from ingle.config.evaluate import TaskConfig
from ingle.config.objective import Answer, Classify, ObjectiveConfig, Tag
from ingle.config.preferences import Reward
from ingle.config.run import Run
from ingle.evaluation.run.answer_sources import OutputSource
from ingle.evaluation.run.baselines import OverlapSource, PromptedSource, count_majority, why_not_prompted
from ingle.evaluation.run.reward_source import LengthSource, count_chars
from ingle.evaluation.tasks.samples import best_and_worst
from ingle.events import Sink, Warned
from ingle.parallel import Mesh
from ingle.report.results import Comparison

#: Loads the base as a language model.
LoadBase = Callable[[], evaluation.ModelSource]


def has_new_head(objective: ObjectiveConfig) -> bool:
    """Returns whether an objective trains a head that the base does not have, so that the base is no baseline."""
    return isinstance(objective, Classify | Tag | Answer | Reward)


def compare_with_rules(
    run: Run,
    task: TaskConfig,
    tuned: evaluation.TaskResult,
    load_base: LoadBase | None,
    *,
    sink: Sink = lambda event: None,
) -> dict[str, Comparison]:
    """Compares a model that has a new head with all baselines; the strongest comes first.

    Args:
        run: The run, with the names of all labels.
        task: Its task, or another one.
        tuned: Outputs of the trained model.
        load_base: Loads the base for the zero-shot baseline; None if it cannot be loaded.
        sink: Receives progress and warnings.

    Raises:
        DataError: The training data cannot be read any more.
    """
    results = {
        rule.name: evaluation.run_task(rule, task, run.objective.kind, sink=sink)
        for rule in _rules(run, load_base, sink)
    }
    return evaluation.compare_all(results, tuned, task)


def _rules(run: Run, load_base: LoadBase | None, sink: Sink) -> Sequence[OutputSource]:
    objective = run.objective
    if isinstance(objective, Answer):
        return [OverlapSource()]
    if isinstance(objective, Reward):
        return [_length_rule(run)]
    assert isinstance(objective, Classify | Tag)
    problem = "single" if isinstance(objective, Tag) else objective.problem
    assert problem != "auto", "the labels have no names yet"
    names = objective.labels or ()
    rows = data.read_examples(run.data.sources, objective=objective.kind)
    rules: list[OutputSource] = [count_majority(rows, names, problem)]
    if isinstance(objective, Tag) or load_base is None:
        return rules
    why_not = why_not_prompted(names, problem)
    if why_not is None:
        base = load_base()
        rules.append(PromptedSource(base, names, is_chat=bool(base.tokenizer.chat_template)))
    elif problem == "single":
        sink(Warned(f"There is no zero-shot baseline: {why_not}.", where="evaluate"))
    return rules


def _length_rule(run: Run) -> LengthSource:
    """Returns the rule that prefers the longer answer, or the shorter one if that is right in most training rows."""
    signs = 0
    for row in data.read_examples(run.data.sources, objective=run.objective.kind):
        found = best_and_worst(row)
        difference = 0 if found is None else count_chars(found[0]) - count_chars(found[1])
        signs += (difference > 0) - (difference < 0)
    return LengthSource(longer=signs >= 0)


def base_loader(run: Run, model: Any, tokenizer: Any, *, mesh: Mesh | None = None, sink: Sink) -> LoadBase | None:
    """Returns what loads the base of a classifier as a language model; None if it is none that can be prompted.

    Args:
        run: The run.
        model: The trained model; its weights are dropped when the base is loaded.
        tokenizer: Its tokenizer.
        mesh: The ranks, of which each loads the whole base.
        sink: Receives progress and warnings.
    """
    if run.objective.kind != "classify" or run.model.init == "random" or models.kind_of(model.config) != "causal":
        return None

    @cache
    def load() -> evaluation.ModelSource:
        device = next(model.parameters()).device
        model.to("meta")  # memory for both may be missing
        base = models.load_model(run.model, run.base, device=device, sink=sink)
        return evaluation.ModelSource(base, tokenizer, "base", mesh=mesh)

    return load
