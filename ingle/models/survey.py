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
from ingle.models.kinds import ModelKind, ModelTask, TaskKind, kind_of, refusal
from ingle.models.loading.config_json import read_config
from ingle.models.loading.layout_choice import choose_layout
from ingle.models.loading.meta_device import build
from ingle.models.loading.small_config import Size, shrink
from ingle.models.text_part import text_config, with_text_config
from ingle.planning.model_types import LayoutKind, ModelType
from ingle.quant import convert
from ingle.quant.experts import is_experts

_SIZE = Size(width=32, layers=4, vocab_size=128, positions=64)
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


def default_config(name: str, kind: ModelKind) -> PretrainedConfig:
    """Returns the default config of a ``model_type``, as a model of this kind."""
    config: PretrainedConfig = CONFIG_MAPPING[name]()
    if kind == "causal" and kind_of(config) != kind:
        config.is_decoder, config.is_encoder_decoder = True, False
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
        return ModelType(name, kind, reason="it gives other results for several documents in a batch than for each")
    try:
        small = with_text_config(config, shrink(text_config(config), _SIZE))
        model = build(small, torch.float32, trust_remote_code=trust_remote_code, layout=choice.layout)
    except Exception:
        return ModelType(name, kind, reason="no small model of it can be built; a real one is tried when it is loaded")
    has_experts = any(map(is_experts, model.modules()))
    layout: LayoutKind | None = model.packed_layout.kind if choice.tried else None
    unquantized = None
    try:
        convert(model, Nf4Base(format="nf4"))
    except QuantizationError as error:
        unquantized = error.message
    return ModelType(
        name,
        kind,
        layout=layout,
        dealt=model.packed_layout.dealt,
        quantizes=unquantized is None,
        has_experts=has_experts,
        objectives=(*_OBJECTIVES[kind], *(task for task in _HEADS if _has_head(config, task))),
        exports=("safetensors", "gguf") if name in BY_MODEL_TYPE else ("safetensors",),
        reason=unquantized
        or (None if choice.tried else "no small model of it runs; a real one is verified when loaded"),
    )


def _has_head(config: PretrainedConfig, task: TaskKind) -> bool:
    try:
        return refusal(copy.deepcopy(config), ModelTask(task, ("a", "b"))) is None
    except IngleError:
        return False
