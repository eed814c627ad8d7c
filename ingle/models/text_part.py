"""The text part of a multimodal model: the published class without its image and audio towers.

A multimodal checkpoint is a text model inside a wrapper. Ingle builds the wrapper on the meta device and removes every
module that text does not pass through. All names (weights, adapters, errors) stay those of the published model.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

#: Where to look for the class of a wrapper, in order. The mapping of causal language models is not among them: for some
#: wrappers it names the class of the text part, which cannot read the published weights.
_MAPPINGS = (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)
#: Vision towers of the timm package, which is needed even on the meta device.
_TIMM_TOWERS = ("timm_wrapper", "gemma3n_vision")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Returns the section of a config that describes the text model; the config itself if it has no such section."""
    if config.is_encoder_decoder:
        return config
    section: PretrainedConfig = config.get_text_config(decoder=True)
    return section


def padding_id(config: PretrainedConfig) -> int:
    """Returns a token for padding that is hidden by a mask; some configs have none, or -1 for none."""
    padding = getattr(text_config(config), "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else 0


def is_wrapper(config: PretrainedConfig) -> bool:
    """Returns whether a config describes a text model inside a multimodal one."""
    return text_config(config) is not config


def wrapper_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Returns the class that a multimodal checkpoint is published for; None if none of transformers predicts text.

    Args:
        config: The config of a wrapper.
    """
    for mapping in _MAPPINGS:
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            kind: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return kind
    return None


def text_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Returns the class of a text model whose config transformers maps to no class, but that of its wrapper (Emu3).

    Args:
        config: The config of a text model.
    """
    wrapper = model_type_to_module_name(config.model_type)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or wrapper not in CONFIG_MAPPING:
        return None
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[wrapper], None)
    found: type[PreTrainedModel] | None = kind if getattr(kind, "config_class", None) is type(config) else None
    return found


def build_wrapper(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a complete multimodal model on the meta device."""
    kind = wrapper_class(config)
    assert kind is not None, f"{config.model_type} has no class that predicts text"
    config = copy.deepcopy(config)
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "model_type", None) in _TIMM_TOWERS:
        # The tower is removed in any case, so a small one of another class takes its place.
        width = getattr(vision, "hidden_size", 32)
        small: Any = SiglipVisionConfig(
            hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
        )
        for key, value in vars(vision).items():
            if not hasattr(small, key):
                setattr(small, key, value)
        vars(config)["vision_config"] = small  # an assignment would check its class
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config, dtype=dtype)
    if vision is not None:
        model.config.vision_config = vision  # saved with the model
    return model


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the part of a multimodal model with the embedding, the layers and the last norm, without the head."""
    decoder: Any = model.get_decoder()
    while decoder.get_output_embeddings() is not None:
        # Llama 4 and others have a causal model, head included, inside the wrapper.
        embedding: Any = decoder.get_input_embeddings()
        decoder = next(child for child in decoder.children() if _contains(child, {id(embedding)}))
    found: PreTrainedModel = decoder
    return found


def for_text_part(config: PretrainedConfig, value: str) -> str | dict[str, str]:
    """Returns a value that transformers sets by section of a config, for the text part only."""
    if not is_wrapper(config):
        return value
    return dict.fromkeys(["", *_text_sections(config)], value)


def with_text_config(config: PretrainedConfig, text: PretrainedConfig) -> PretrainedConfig:
    """Returns a copy of a config with another section for the text model; ``text`` itself if it is no wrapper's."""
    if not is_wrapper(config):
        return text
    changed = copy.deepcopy(config)
    for key in _text_sections(config):
        setattr(changed, key, text)
    return changed


def build_text_part(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a multimodal model on the meta device, without its towers."""
    model = build_wrapper(config, dtype)
    remove_towers(model)
    return model


def _text_sections(config: PretrainedConfig) -> list[str]:
    return [key for key in config.sub_configs if getattr(config, key, None) is text_config(config)]


def remove_towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Removes, in place, everything that text does not pass through.

    Layers that attend to images only (Llama 3.2 Vision) become empty modules, because other layers are found by number.

    Args:
        model: A complete multimodal model.

    Returns:
        The paths of removed modules and parameters.
    """
    decoder = text_decoder(model)
    kept = {id(decoder), id(model.get_output_embeddings())}
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING:  # an encoder has more layers before its output layer
        kept |= {id(child) for child in model.children() if not _contains(child, {id(decoder)})}
    removed = _remove_below(model, "", kept)
    path = next(name for name, module in model.named_modules() if module is decoder)
    for index in getattr(text_config(model.config), "cross_attention_layers", None) or ():
        name = f"{path}.layers.{index}"
        model.set_submodule(name, nn.Module())
        removed.append(name)
    return tuple(removed)


def tower_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the paths that :func:`remove_towers` has removed from a model; none of a text model."""
    return remove_towers(build_wrapper(model.config, torch.float32)) if is_wrapper(model.config) else ()


def _remove_below(parent: nn.Module, path: str, kept: set[int]) -> list[str]:
    """Removes the children and parameters of a module on the way to the kept modules."""
    removed = [f"{path}{key}" for key, parameter in parent._parameters.items() if parameter is not None]
    parent._parameters.clear()
    code = inspect.getsource(type(parent).forward)
    for key, child in list(parent._modules.items()):
        if child is None or id(child) in kept or f"self.{key}(input_ids" in code:  # Gemma 3n: ids of image tokens
            continue
        if _contains(child, kept):
            removed += _remove_below(child, f"{path}{key}.", kept)
        else:
            if f"self.{key}.device" in code:
                parent._modules[key] = _NoTower()
            else:
                del parent._modules[key]
            removed.append(f"{path}{key}")
    return removed


class _NoTower(nn.Module):
    """Goes in the place of a tower whose device is read for texts, too (Qwen2-Audio)."""

    device = torch.device("meta")


def _contains(module: nn.Module, kept: set[int]) -> bool:
    return any(id(part) in kept for part in module.modules())
