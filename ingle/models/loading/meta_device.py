"""Builds models on the meta device: all modules, without memory for weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ingle.config.model import ModelConfig
from ingle.models.boundary import COMPARE_CONFIG, reading
from ingle.models.forward.documents import Boundaries
from ingle.models.forward.layout import Layout, apply_layout
from ingle.models.forward.rotary_by_length import rotate_by_document
from ingle.models.forward.task_heads import find_heads
from ingle.models.forward.to_head import name_projection
from ingle.models.kinds import ModelTask, kind_of, new_model
from ingle.models.loading.config_json import config_path, read_config, untrainable
from ingle.models.loading.gguf_model import is_gguf
from ingle.models.loading.layout_choice import choose_layout
from ingle.models.loading.safetensors_files import refuse_larger
from ingle.models.text_part import build_text_part, is_wrapper, text_config

#: Subclasses of ``nn.Linear`` that compute exactly what ``nn.Linear`` does.
_LINEARS = {"FalconLinear"}

#: Options of an architecture that change only how it computes, set to what works for packed documents.
_PINNED: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},  # else it changes with the width of a row
    "bigbird_pegasus": {"attention_type": "original_full"},
    "rwkv": {"rescale_every": 0},  # else it divides its weights in place, against overflow in float16
}

#: Settings that change the results of evaluation, too.
_NOT_DROPOUTS = frozenset({"moe_token_dropout"})

#: What the names and signatures of an architecture's modules suggest.
_PROPOSED = Layout()
_LANGUAGE_MODEL = ModelTask()


def compute_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """Returns the dtype to compute in.

    ``auto`` is bfloat16 where the hardware multiplies it fast (GPUs since Ampere, CPUs with AMX or AVX512-BF16), and
    float32 elsewhere.
    """
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        fast = kind == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def meta_model(
    model: ModelConfig, device: torch.device | str, dtype: torch.dtype, task: ModelTask = _LANGUAGE_MODEL
) -> PreTrainedModel:
    """Builds a model on the meta device.

    Args:
        model: The config section of the model.
        device: The device on which it will compute.
        dtype: Its compute dtype; parameters that the architecture keeps in float32 stay in float32.
        task: What its head predicts.

    Raises:
        ModelError: The architecture is unknown, no model of text for this task, or not supported.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    config = read_config(model, task)
    path = config_path(model)
    settings = config.to_dict()
    with reading(path, "transformers cannot build a model from these settings.", fix=COMPARE_CONFIG, settings=settings):
        layout = _find_layout(config, model, task)
        built = build(config, dtype, trust_remote_code=model.trust_remote_code, layout=layout, task=task)
    if task.kind == "lm" and built.get_output_embeddings() is None:
        raise untrainable(model, "it has no output layer")
    if not isinstance(built.get_input_embeddings(), torch.nn.Module):
        raise untrainable(model, "it has no table of token embeddings")
    if model.init != "random" and not is_gguf(model.id):
        refuse_larger(sum(parameter.numel() for parameter in built.parameters()), path.parent)
    return built


def _find_layout(config: PretrainedConfig, model: ModelConfig, task: ModelTask) -> Layout:
    if task.kind != "lm" and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        # T5Gemma's head reads one token beyond a text if there is room in its row.
        return Layout(
            "equal_rows" if config.model_type.startswith("t5gemma") else "rows",
            slower_because="its head reads what a decoder makes of each text",
        )
    choice = choose_layout(config, trust_remote_code=model.trust_remote_code)
    if not choice.is_causal and kind_of(config) == "causal" and task.kind == "lm":
        reason = "with these settings its tokens see later tokens, so that each would be predicted from itself"
        raise untrainable(model, reason)
    if choice.layout is None:
        raise untrainable(model, choice.reason)
    return choice.layout


def build(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    layout: Layout = _PROPOSED,
    boundaries: Boundaries | None = None,
    task: ModelTask = _LANGUAGE_MODEL,
) -> PreTrainedModel:
    """Builds a model on the meta device from a config, prepared for packed documents.

    Of a multimodal model, only the parts that text passes through are built. The architecture's own dropouts are set to
    zero, because adapters have their own.

    Args:
        config: The config.
        dtype: The compute dtype.
        trust_remote_code: Whether to run the model's own code.
        layout: How packed documents go through it.
        boundaries: A holder to share with another model.
        task: What its head predicts; the config then has its labels.
    """
    config = copy.deepcopy(config)
    task.describe_in(config)
    dropouts = [_dropouts(section) for section in _sections(config)]
    for section, values in zip(_sections(config), dropouts, strict=True):
        _set(section, {name: type(value)(0) for name, value in values.items()})
    for key, value in _PINNED.get(text_config(config).model_type, {}).items():
        setattr(text_config(config), key, value)
    for section in {id(each): each for each in (config, text_config(config))}.values():
        if hasattr(section, "quantization_config"):
            del section.quantization_config  # Ingle does its own quantization, and saved models are not in that format
    model: PreTrainedModel
    if is_wrapper(config) and task.kind == "lm":
        model = build_text_part(config, dtype)
    else:
        with torch.device("meta"):
            model = new_model(config, task, dtype=dtype, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        _use_plain_linears(model)
    name_projection(model)
    if task.kind != "lm":  # what lies before the head belongs to it
        layout = replace(layout, has_layers_before_head=False)
    apply_layout(model, layout, boundaries)
    rotate_by_document(model)
    _keep_in_float32(model, dtype)
    for section, values in zip(_sections(model.config), dropouts, strict=True):
        _set(section, values)
    stored: Any = model
    stored.packed_task = task
    stored.task_heads = find_heads(model) if task.kind != "lm" else ()
    return model


def _sections(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Returns a config and its sections for the parts of a model that text passes through."""
    sections = [config, text_config(config)]
    for name in ("encoder", "decoder"):
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            sections += _sections(part)
    return list({id(section): section for section in sections}.values())


def _dropouts(section: PretrainedConfig) -> dict[str, float]:
    named = {name: value for name, value in vars(section).items() if "drop" in name and name not in _NOT_DROPOUTS}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, float) or (type(value) is int and "dropout" in name)
    }


def _set(section: PretrainedConfig, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        setattr(section, name, value)


def compute_rest(architecture: PreTrainedModel, device: torch.device, names: Collection[str], *, seed: int = 0) -> None:
    """Computes, in place, values that no file contains: rotary frequencies, masks, and parameters that may be missing.

    The architecture's own code initializes them. All other parameters stay on the meta device and are marked as
    initialized.

    Args:
        architecture: A model on the meta device.
        device: Device of the values.
        names: Parameters and buffers to compute.
        seed: Seed of random values.
    """
    for parameter in architecture.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = architecture.get_submodule(path)
        empty = torch.empty_like(getattr(owner, leaf), device=device)
        if leaf in owner._buffers:
            owner._buffers[leaf] = empty
        else:
            owner._parameters[leaf] = nn.Parameter(empty)
    with seeded(seed):
        architecture.initialize_weights()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generator inside the block and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _use_plain_linears(model: PreTrainedModel) -> None:
    """Replaces equivalent subclasses by ``nn.Linear``, so that they are quantized and adapted like all others."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module).__name__ in _LINEARS:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, plain)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keeps the parameters in float32 that ``from_pretrained`` keeps in float32 for this architecture."""
    patterns = model._keep_in_fp32_modules_strict if dtype == torch.bfloat16 else None
    if not patterns:
        return
    keep = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if keep.search(f"{path}.{name}"):
                setattr(module, name, nn.Parameter(parameter.float(), parameter.requires_grad))
