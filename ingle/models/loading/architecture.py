"""From a config.json to a model without bytes: what can be trained, and in which number type.

Any causal language model of transformers whose tokens meet only in attention is taken.  Others are refused here,
before a byte of weights is read, with the reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.models.boundary import (
    COMPARE_CONFIG,
    read_object,
    reading,
    refuse_absurd,
    refuse_impossible,
)
from ingle.models.forward.attention import IMPLEMENTATION
from ingle.models.forward.rotary_by_length import rotate_by_document
from ingle.models.loading.gguf_model import is_gguf, open_gguf, read_gguf_config
from ingle.models.loading.hub import locate
from ingle.models.loading.safetensors_files import refuse_larger

#: Kinds of layers whose reach :mod:`ingle.models.forward.attention` computes.
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}

#: Linear layers that an architecture spells in a class of its own and that compute what ``nn.Linear`` does.
_LINEARS = {"FalconLinear"}

_STATEFUL = re.compile(r"Mamba|SSM|Rwkv|Recurrent|LinearAttention|LightningAttention|GatedDelta|ShortConv|RgLru")


def compute_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """The number type to compute in.

    ``auto`` is bfloat16 where the hardware multiplies it fast (GPUs from Ampere on, CPUs with AMX or AVX512-BF16),
    else float32.
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


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The architecture's config.

    Raises:
        ModelError: When there is none, or it is not a causal language model that can be trained here.
        HubUnavailable: When the hub is needed and cannot be reached.
    """
    if is_gguf(model.id):
        described, raw = read_gguf_config(open_gguf(model.id, revision=model.revision))
        _refuse_config(described, raw, model)
        return described
    folder = locate(model.id, revision=model.revision, code=model.trust_remote_code)
    raw = read_json(folder, model)
    path = folder / "config.json"
    if "auto_map" in raw and not model.trust_remote_code and not _is_known(raw):
        raise ModelError(
            f"{model.id} comes with Python code of its own.",
            where="model.trust_remote_code = false",
            fix="read that code, then set --model.trust_remote_code=true",
        )
    if "model_type" not in raw:
        raise ModelError("config.json has no model_type.", where=str(path), fix=COMPARE_CONFIG)
    if not model.trust_remote_code and not _is_known(raw):
        raise ModelError(
            f"The architecture of {model.id} is not known to the installed transformers.",
            where=str(path),
            why=f"model_type is {raw.get('model_type')!r}",
            fix="upgrade transformers, or choose another model",
        )
    with reading(path, "transformers cannot read config.json.", fix=COMPARE_CONFIG):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
        _refuse_config(config, raw, model)
        refuse_impossible(config, path)
    return config


def _is_known(raw: Mapping[str, Any]) -> bool:
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def meta_model(model: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: every module, no bytes.

    Args:
        model: Which model.
        device: Where it will compute.
        dtype: Its compute type; parameters the architecture keeps in float32 stay so.

    Raises:
        ModelError: When the architecture is unknown, not a causal language model, or not supported.
        HubUnavailable: When the hub is needed and cannot be reached.
    """
    config = read_config(model)
    path = config_path(model)
    settings = config.to_dict()
    with reading(path, "transformers cannot make a model of these settings.", fix=COMPARE_CONFIG, settings=settings):
        built = build(config, dtype, trust_remote_code=model.trust_remote_code)
        _refuse_modules(built, model)
    if model.init != "random" and not is_gguf(model.id):
        refuse_larger(sum(parameter.numel() for parameter in built.parameters()), path.parent)
    return built


def config_path(model: ModelConfig) -> Path:
    """The file that says what a model is made of."""
    if is_gguf(model.id):
        return open_gguf(model.id, revision=model.revision).path
    return locate(model.id, revision=model.revision, code=model.trust_remote_code) / "config.json"


def build(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the meta device from a config, with our attention where the architecture allows it.

    The architecture's own dropouts are zero: regularisation is the adapter's business.
    """
    config = copy.deepcopy(config)
    dropouts = _dropouts(config)
    for name in dropouts:
        setattr(config, name, 0.0)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the planes are ours; a saved model is not in the checkpoint's format
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if type(model)._supports_attention_backend:
            model.set_attn_implementation(IMPLEMENTATION)
        _use_plain_linears(model)
    rotate_by_document(model)
    _keep_in_float32(model, dtype)
    for name, value in dropouts.items():
        setattr(model.config, name, value)
    return model


def _dropouts(config: PretrainedConfig) -> dict[str, float]:
    names = [name for name in vars(config) if "drop" in name]
    return {name: value for name in names if isinstance(value := getattr(config, name), float)}


def _use_plain_linears(model: PreTrainedModel) -> None:
    """So that they are packed and adapted like all others."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child).__name__ in _LINEARS:
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight, plain.bias = child.weight, child.bias
                setattr(parent, name, plain)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What ``from_pretrained`` keeps in float32 (a list of the architecture), so do we."""
    patterns = model._keep_in_fp32_modules_strict if dtype == torch.bfloat16 else None
    if not patterns:
        return
    keep = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if keep.search(f"{path}.{name}"):
                setattr(module, name, nn.Parameter(parameter.float(), parameter.requires_grad))


def read_json(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` of a model says.

    Raises:
        ModelError: It is missing or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{model.id} holds no config.json, so it is not a transformers model.",
            where=str(folder),
            fix="put the base model into model.id and the adapter folder into adapter.path"
            if (folder / "adapter_config.json").is_file()
            else "give the folder that holds config.json and the .safetensors files",
        )
    raw = read_object(path)
    refuse_absurd(raw, path)
    return raw


def bitnet_divides(raw: Mapping[str, Any]) -> bool:
    """Whether the scales of a packed BitNet checkpoint divide: they do unless ``config.json`` names another layer."""
    settings = raw.get("quantization_config") or {}
    return str(settings.get("linear_class", "bitlinear")) == "bitlinear"


def _refuse_config(config: PretrainedConfig, raw: dict[str, Any], model: ModelConfig) -> None:
    """Refuses what is no causal language model over text."""
    kind = config.model_type
    remote = model.trust_remote_code and "AutoModelForCausalLM" in raw.get("auto_map", {})
    reason = None
    packed_by = (raw.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if packed_by not in ("bitsandbytes", "hqq", "bitnet"):
        raise ModelError(
            f"The weights of {model.id} are quantized with {packed_by}, which cannot be read.",
            where="model.id",
            fix="name the model's original weights in model.id and set base.format (nf4, int8)",
        )
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif (raw.get("quantization_config") or {}).get("use_rms_norm"):
        reason = "its BitNet layers have norms of their own, which are not supported"
    elif not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"transformers has no causal language model for model_type {kind!r}"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        reason = f"it is an encoder ({', '.join(config.architectures or [kind])})"
    elif config.get_text_config() is not config:
        reason = "it reads images or sound besides text, which is not supported yet"
    elif kind == "bloom" or getattr(config, "alibi", False):
        reason = "its attention knows positions by a bias (ALiBi), which is not computed for packed documents"
    elif unknown := sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS):
        reason = f"it has layers of kind {', '.join(unknown)}, through which packed documents would see one another"
    if reason:
        raise ModelError(
            f"{model.id} cannot be trained here: {reason}.",
            where="model.id",
            fix="choose a decoder-only language model (Llama, Mistral, Qwen, Gemma, Phi, OLMo, Mixtral, ...)",
        )


def _refuse_modules(model: PreTrainedModel, config: ModelConfig) -> None:
    """Refuses models that carry state from token to token outside attention."""
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise ModelError(
            f"{config.id} cannot be trained here: its attention has sinks, which packed attention does not compute.",
            where="model.id",
            fix="choose a decoder-only language model with plain attention",
        )
    stateful = next(
        (
            type(module).__name__
            for module in model.modules()
            if _STATEFUL.search(type(module).__name__) or isinstance(module, nn.Conv1d)
        ),
        "state" if getattr(model, "_is_stateful", False) else None,
    )
    if stateful:
        raise ModelError(
            f"{config.id} cannot be trained here: it carries state from token to token ({stateful}), "
            "so packed documents would see one another.",
            where="model.id",
            fix="choose a decoder-only language model with attention alone",
        )
