"""Kinds of models, and what they are trained for: together they name the class that transformers builds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from transformers import PretrainedConfig, PreTrainedModel

from ingle.errors import ModelError
from ingle.models.text_part import is_wrapper, text_class, wrapper_class

#: ``causal``: each token sees earlier ones. ``encoder``: each token sees all. ``encoder_decoder``: both, in two parts.
ModelKind = Literal["causal", "encoder", "encoder_decoder"]
TaskKind = Literal["lm", "classify", "tag", "answer"]
#: Problems of a classification under transformers' names.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]

_NAMES: Mapping[str, str] = {
    "causal": "a causal model",
    "encoder": "an encoder",
    "encoder_decoder": "an encoder-decoder",
}
#: Objectives for language models of each kind.
_OBJECTIVES: Mapping[ModelKind, str] = {"causal": "sft", "encoder": "mlm", "encoder_decoder": "seq2seq"}


#: What the names of transformers' classes say.
_ARCHITECTURES: Mapping[str, TaskKind] = {
    "SequenceClassification": "classify",
    "TokenClassification": "tag",
    "QuestionAnswering": "answer",
}


@dataclass(frozen=True, slots=True)
class ModelTask:
    """What the head of a model predicts.

    Attributes:
        kind: ``lm``: tokens. ``classify``: labels of a document. ``tag``: labels of its tokens. ``answer``: the first
            and the last token of an answer.
        labels: Their names; none for a regression to a single number.
        problem: The problem of a classification.
    """

    kind: TaskKind = "lm"
    labels: tuple[str, ...] = ()
    problem: Problem | None = None

    @property
    def num_outputs(self) -> int:
        """Numbers that the head predicts for a document or a token; 0 for language models."""
        return {"lm": 0, "answer": 2}.get(self.kind, max(1, len(self.labels)))

    @classmethod
    def stored_in(cls, config: PretrainedConfig) -> ModelTask:
        """Returns what the head of a checkpoint predicts, given its config."""
        name = (config.architectures or [""])[0]
        kind: TaskKind = next((kind for part, kind in _ARCHITECTURES.items() if f"For{part}" in name), "lm")
        if kind in ("lm", "answer"):
            return cls(kind)
        named: Mapping[Any, str] = config.id2label or {}
        labels = tuple(named[index] for index in sorted(named))
        if kind == "tag":
            return cls(kind, labels)
        problem: Any = config.problem_type or ("regression" if len(labels) == 1 else "single_label_classification")
        return cls(kind, () if problem == "regression" else labels, problem)

    def describe_in(self, config: PretrainedConfig) -> None:
        """Writes the labels into a config, in place, under transformers' names."""
        if self.kind == "lm":
            return
        names = self.labels or tuple(f"LABEL_{index}" for index in range(self.num_outputs))
        config.id2label = dict(enumerate(names))  # transformers counts them to size the head
        config.label2id = {name: index for index, name in enumerate(names)}
        if self.problem is not None:
            config.problem_type = self.problem


_LANGUAGE_MODEL = ModelTask()

#: The auto class for a language model of each kind, its models by config, and what such a model is called.
_LANGUAGE_MODELS: Mapping[ModelKind, tuple[Any, Any, str]] = {
    "causal": (hf.AutoModelForCausalLM, hf.MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model"),
    "encoder": (hf.AutoModelForMaskedLM, hf.MODEL_FOR_MASKED_LM_MAPPING, "masked language model"),
    "encoder_decoder": (hf.AutoModelForSeq2SeqLM, hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "encoder-decoder of text"),
}
_TASKS: Mapping[TaskKind, tuple[Any, Any, str]] = {
    "classify": (
        hf.AutoModelForSequenceClassification,
        hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "model that classifies texts",
    ),
    "tag": (
        hf.AutoModelForTokenClassification,
        hf.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "model that classifies tokens",
    ),
    "answer": (
        hf.AutoModelForQuestionAnswering,
        hf.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        "model that finds answers",
    ),
}


#: Why architectures that transformers maps are not trained on texts.
_REASONS: Mapping[str, str] = {
    "gemma4_assistant": "it drafts tokens from what another model computes",
    "gemma4_unified_assistant": "it drafts tokens from what another model computes",
    "perceiver": "it computes all its positions for every text, and has no output layer",
    "prophetnet": "its decoder computes several tokens ahead in streams of its own",
    "reformer": "in training, each of its texts must fill all its positions",
    "voxtral_realtime": "it computes no text without sound",
}


def kind_of(config: PretrainedConfig) -> ModelKind:
    """Returns the kind of a model."""
    if config.is_encoder_decoder:
        return "encoder_decoder"
    if getattr(config, "is_decoder", False):
        return "causal"
    if getattr(config, "causal", False) and type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING:  # XLM
        return "causal"
    classes = _own_classes(config)
    if "AutoModelForMaskedLM" in classes or type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING:
        return "causal" if "AutoModelForCausalLM" in classes else "encoder"
    # The encoder of an encoder-decoder alone, as in T5ForTokenClassification.
    part = type(config) in hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not is_wrapper(config)
    return "encoder" if part else "causal"


def require_kind(config: PretrainedConfig, kinds: Collection[str], objective: str) -> None:
    """Refuses an objective that does not train models of this kind.

    Args:
        config: The model's config.
        kinds: The kinds that the objective trains.
        objective: Its name.

    Raises:
        ModelError: The kind is another one.
    """
    kind = kind_of(config)
    if kind in kinds:
        return
    raise ModelError(
        f"The objective {objective} does not train this model: it is {_NAMES[kind]}.",
        where=f"objective.kind = {objective}",
        why=f"model_type is {config.model_type!r}",
        fix=f"use --objective.kind={_OBJECTIVES[kind]}, or choose {' or '.join(_NAMES[each] for each in kinds)}",
    )


def new_model(
    config: PretrainedConfig, task: ModelTask, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Builds a model with transformers, on the device of the context.

    Args:
        config: The config; of no wrapper if it is a language model.
        task: What it is trained for.
        dtype: The dtype of its parameters.
        trust_remote_code: Whether the model's own code may run.
    """
    text = text_class(config) if task.kind == "lm" else None
    model: PreTrainedModel = (
        _auto(config, task)[0].from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if text is None
        else text._from_config(config, dtype=dtype)
    )
    return model


def refusal(config: PretrainedConfig, task: ModelTask, *, own_code: bool = False) -> str | None:
    """Returns why transformers cannot build a model; None if it can.

    Args:
        config: The model's config.
        task: What it is trained for.
        own_code: Whether the model's own code may run.
    """
    auto, models, described = _auto(config, task)
    if config.model_type in _REASONS:
        return _REASONS[config.model_type]
    if own_code and auto.__name__ in _own_classes(config):
        return None
    built = models.get(type(config), None)
    if task.kind == "lm":
        built = wrapper_class(config) if is_wrapper(config) else text_class(config) or built
        described = "model that predicts text" if is_wrapper(config) else described
    return None if built is not None else f"transformers has no {described} for model_type {config.model_type!r}"


def task_of(model: PreTrainedModel) -> ModelTask:
    """Returns what a model from :func:`ingle.models.meta_model` was built for."""
    found: ModelTask = getattr(model, "packed_task", ModelTask())
    return found


def reader_class(config: PretrainedConfig, task: ModelTask = _LANGUAGE_MODEL) -> str:
    """Returns the name of the class of transformers that reads a published model for a task."""
    own = None
    if task.kind == "lm":
        own = wrapper_class(config) if is_wrapper(config) else text_class(config)
    name: str = (_auto(config, task)[0] if own is None else own).__name__
    return name


def class_that_reads(model: PreTrainedModel) -> str:
    """Returns the name of the class of transformers that reads a model from its files."""
    return reader_class(model.config, task_of(model))


def _own_classes(config: PretrainedConfig) -> Mapping[str, str]:
    """Returns the classes of the model's own code by auto class."""
    return getattr(config, "auto_map", None) or {}


def _auto(config: PretrainedConfig, task: ModelTask) -> tuple[Any, Any, str]:
    return _LANGUAGE_MODELS[kind_of(config)] if task.kind == "lm" else _TASKS[task.kind]
