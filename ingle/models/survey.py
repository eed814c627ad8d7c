"""Finds out how Ingle trains an architecture: its layout, formats, objectives and exports, from a tiny copy."""

from __future__ import annotations

import copy

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ingle.config.base import Nf4Base
from ingle.config.model import ModelConfig
from ingle.errors import IngleError, QuantizationError
from ingle.gguf.families import BY_MODEL_TYPE
from ingle.models.forward.layout import layout_of
from ingle.models.kinds import ModelKind, ModelTask, TaskKind, kind_of, refusal
from ingle.models.loading.config_json import read_config
from ingle.models.loading.layout_choice import choose_layout
from ingle.models.loading.meta_device import build
from ingle.models.text_part import text_config
from ingle.planning.model_types import ModelType
from ingle.quant import convert
from ingle.quant.experts import is_experts

#: Objectives of language models of each kind; those with heads follow.
_OBJECTIVES: dict[ModelKind, tuple[str, ...]] = {
    "causal": ("clm", "sft"),
    "encoder": ("mlm",),
    "encoder_decoder": ("span", "seq2seq"),
}
_HEADS: tuple[TaskKind, ...] = ("classify", "tag", "answer")


def known_types() -> list[tuple[str, ModelKind]]:
    """Returns every ``model_type`` of the installed transformers that has a language model, with each of its kinds."""
    pairs = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    # Some that read sound are listed there, too; of a text, their causal model is trained.
    sound = {name for name in pairs if not CONFIG_MAPPING[name].is_encoder_decoder}
    found: dict[ModelKind, set[str]] = {
        "causal": set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | sound,
        "encoder": set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - set(pairs),
        "encoder_decoder": set(pairs) - sound,
    }
    return sorted((name, kind) for kind, names in found.items() for name in names)


def as_kind(config: PretrainedConfig, kind: ModelKind) -> PretrainedConfig:
    """Returns a config, changed in place, as that of a model of a kind that its type has."""
    if kind == "causal" and kind_of(config) != kind:
        config.is_decoder, config.is_encoder_decoder = True, False
        if hasattr(config, "causal"):
            config.causal = True
    return config


def survey_model(model: ModelConfig) -> ModelType:
    """Returns how Ingle trains a model; reads no weights.

    Raises:
        ModelError: There is none, or it is no text model.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    config = read_config(model)
    return survey(config, kind_of(config), trust_remote_code=model.trust_remote_code)


def survey(config: PretrainedConfig, kind: ModelKind, *, trust_remote_code: bool = False) -> ModelType:
    """Returns how Ingle trains models with the options of a config."""
    name = config.model_type
    reason = refusal(config, ModelTask(), own_code=trust_remote_code)
    if reason is not None:
        return ModelType(name, kind, reason=reason)
    choice = choose_layout(config, trust_remote_code=trust_remote_code)
    if kind == "causal" and not choice.is_causal:
        return ModelType(name, kind, reason="its tokens see later tokens, so that each would be predicted from itself")
    if choice.layout is None:
        return ModelType(name, kind, reason=choice.reason)
    try:
        model = build(config, torch.float32, trust_remote_code=trust_remote_code, layout=choice.layout)
    except Exception as error:  # settings that the architecture's own code rejects
        return ModelType(name, kind, reason=f"it cannot be built with these settings ({type(error).__name__})")
    has_experts = any(map(is_experts, model.modules()))
    layout = layout_of(model)
    unquantized = None
    try:
        convert(model, Nf4Base(format="nf4"))
    except QuantizationError as error:
        unquantized = error.message.rstrip(".")
    return ModelType(
        name,
        kind,
        layout=layout.kind if layout.tried else None,
        dealt=layout.dealt,
        quantizes=unquantized is None,
        has_experts=has_experts,
        objectives=(*_OBJECTIVES[kind], *(task for task in _HEADS if _has_head(config, task))),
        exports=("safetensors", "gguf") if _has_gguf(config, kind) else ("safetensors",),
        reason=unquantized
        or (
            None
            if layout.tried
            else f"no small model of it runs ({layout.slower_because}); a real one is verified when loaded"
        ),
    )


def _has_gguf(config: PretrainedConfig, kind: ModelKind) -> bool:
    """Returns whether a model, or its text part, is written to GGUF files; some families are not of all kinds."""
    family = BY_MODEL_TYPE.get(text_config(config).model_type)
    return family is not None and family.class_name.endswith("ForCausalLM") == (kind == "causal")


def _has_head(config: PretrainedConfig, task: TaskKind) -> bool:
    try:
        return refusal(copy.deepcopy(config), ModelTask(task, ("a", "b"))) is None
    except IngleError:
        return False
