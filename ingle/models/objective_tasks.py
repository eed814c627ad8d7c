"""Objectives and the heads of models: which head an objective trains, and what a head that is there was trained for."""

from __future__ import annotations

from typing import Literal

from ingle.config.objective import Answer, Classify, Mlm, ObjectiveConfig, Seq2Seq, Sft, Tag
from ingle.config.preferences import Reward
from ingle.models.kinds import ModelKind, ModelTask

#: Problems of a classification, under Ingle's names and under transformers'.
_PROBLEMS: dict[
    Literal["single", "multi", "regression"],
    Literal["single_label_classification", "multi_label_classification", "regression"],
] = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}


def model_task(objective: ObjectiveConfig) -> ModelTask:
    """Returns what the head of a model predicts for an objective.

    Args:
        objective: With the names of its labels.
    """
    match objective:
        case Classify(labels=labels, problem=problem):
            assert problem != "auto", "the labels have no names yet"
            return ModelTask("classify", labels or (), _PROBLEMS[problem])
        case Tag(labels=labels):
            return ModelTask("tag", labels or ())
        case Answer():
            return ModelTask("answer")
        case Reward():
            return ModelTask("classify", (), "regression")
        case _:
            return ModelTask()


def keep_stored_labels(given: ObjectiveConfig, found: ObjectiveConfig, stored: ModelTask) -> ObjectiveConfig:
    """Returns an objective with the labels of a checkpoint's head, in its order, so that training continues with it.

    Args:
        given: The objective of the config. If it names its labels, these stay: their order, and so the meaning of
            ``class_weights``, is the user's.
        found: With the labels that were found in the data.
        stored: What the head of the checkpoint predicts. If it lacks a label, nothing changes.
    """
    if not isinstance(found, Classify | Tag) or found.labels is None or getattr(given, "labels", None) is not None:
        return found
    task = model_task(found)
    fits = (stored.kind, stored.problem) == (task.kind, task.problem) and set(found.labels) <= set(stored.labels)
    return found.model_copy(update={"labels": stored.labels}) if fits else found


def has_labels(objective: ObjectiveConfig) -> bool:
    """Returns whether an objective knows the names of its labels, if it has any."""
    match objective:
        case Classify(labels=labels, problem=problem):
            return problem == "regression" or (problem != "auto" and labels is not None)
        case Tag(labels=labels):
            return labels is not None
    return True


def trained_objective(task: ModelTask, kind: ModelKind) -> ObjectiveConfig:
    """Returns an objective that trains such a head on a model of this kind, with the names of its labels."""
    match task.kind:
        case "classify":
            problem = next(own for own, name in _PROBLEMS.items() if name == (task.problem or _PROBLEMS["single"]))
            return Classify(kind="classify", labels=task.labels or None, problem=problem)
        case "tag":
            return Tag(kind="tag", labels=task.labels)
        case "answer":
            return Answer(kind="answer")
    of_text: dict[ModelKind, ObjectiveConfig] = {
        "causal": Sft(),
        "encoder": Mlm(kind="mlm"),
        "encoder_decoder": Seq2Seq(kind="seq2seq"),
    }
    return of_text[kind]
