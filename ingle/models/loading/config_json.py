"""Reads a model's config.json and refuses what cannot be trained, before any weight is read.

Ingle accepts every model of transformers that reads text and predicts tokens, labels or answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ingle.config.base import BaseConfig, NoBase, base_section
from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.models.boundary import COMPARE_CONFIG, read_object, reading, refuse_absurd, refuse_impossible
from ingle.models.kinds import ModelKind, ModelTask, kind_of, refusal
from ingle.models.loading.gguf_model import is_gguf, open_gguf, read_gguf_config
from ingle.models.loading.hub import locate, locate_file
from ingle.models.loading.safetensors_files import read_index
from ingle.models.text_part import text_config

#: Writers of quantized checkpoints that Ingle reads.
_KNOWN_QUANTIZERS = ("bitsandbytes", "hqq", "bitnet", "mxfp4")

_LANGUAGE_MODEL = ModelTask()


def read_config(model: ModelConfig, task: ModelTask | None = _LANGUAGE_MODEL) -> PretrainedConfig:
    """Returns the architecture's config.

    Args:
        model: The config section of the model.
        task: What it is to be trained for; None to accept every architecture.

    Raises:
        ModelError: There is none, or it describes no model of text that can be trained for the task.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    if is_gguf(model.id):
        described, raw = read_gguf_config(open_gguf(model.id, revision=model.revision))
        _refuse_config(described, raw, model, task)
        if task is not None and task.kind == "lm" and kind_of(described) == "encoder":
            raise untrainable(model, "GGUF files of encoders have no head that predicts masked tokens")
        return described
    path = config_path(model)
    raw = read_json(path.parent, model)
    kind = raw.get("model_type")
    if not model.trust_remote_code and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        if "auto_map" in raw:
            raise ModelError(
                f"{model.id} comes with its own Python code.",
                where="model.trust_remote_code = false",
                fix="read that code, then set --model.trust_remote_code=true",
            )
        if kind is not None:
            raise ModelError(
                f"The installed version of transformers does not support the architecture of {model.id}.",
                where=str(path),
                why=f"model_type is {kind!r}",
                fix="upgrade transformers, or choose another model",
            )
    if kind is None:
        raise ModelError("config.json has no model_type.", where=str(path), fix=COMPARE_CONFIG)
    with reading(path, "transformers cannot read config.json.", fix=COMPARE_CONFIG):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path.parent, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
        _refuse_config(config, raw, model, task)
        refuse_impossible(text_config(config), path)
    return config


def config_path(model: ModelConfig) -> Path:
    """Returns the file that describes a model: its config.json or its GGUF file."""
    if is_gguf(model.id):
        return locate_file(model.id, revision=model.revision)
    return locate(model.id, revision=model.revision, code=model.trust_remote_code) / "config.json"


def read_json(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Returns the content of a model's ``config.json``.

    Raises:
        ModelError: It is missing or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{model.id} contains no config.json, so it is not a transformers model.",
            where=str(folder),
            fix="put the base model into model.id and the adapter folder into adapter.path"
            if (folder / "adapter_config.json").is_file()
            else "use the folder that contains config.json and the .safetensors files",
        )
    raw = read_object(path)
    refuse_absurd(raw, path)
    return raw


def stored_base(model: ModelConfig) -> BaseConfig:
    """Returns the base section of the format in which a published checkpoint is quantized.

    It is ``none`` for unquantized weights, and for a GGUF file, in which every tensor has its own type.

    Raises:
        ModelError: There is no such model.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    if is_gguf(model.id):
        return NoBase()
    path = config_path(model)
    settings = read_json(path.parent, model).get("quantization_config") or {}
    fix = "fetch config.json again; its quantization_config is damaged"
    with reading(path, "The format of the quantized weights cannot be read.", fix=fix):
        return _base_of(settings, model)


def stored_kind(model: ModelConfig) -> ModelKind:
    """Returns the kind of a published model; errors as in :func:`stored_task`."""
    return kind_of(read_config(model, None))


def stored_task(model: ModelConfig) -> ModelTask:
    """Returns what the head of a published checkpoint predicts; ``lm`` for a checkpoint that does not say.

    Raises:
        ModelError: There is no such model.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    return ModelTask.stored_in(read_config(model, None))


def bitnet_divides(raw: Mapping[str, Any]) -> bool:
    """Returns whether weights of a quantized BitNet checkpoint are divided by their scales rather than multiplied.

    This is so unless ``config.json`` names another layer class than ``bitlinear``.
    """
    settings = raw.get("quantization_config") or {}
    return str(settings.get("linear_class", "bitlinear")) == "bitlinear"


def _base_of(settings: Mapping[str, Any], model: ModelConfig) -> BaseConfig:
    match settings.get("quant_method"):
        case "hqq":
            params = settings["quant_config"]["weight_quant_params"]
            return base_section({"format": "hqq", "bits": params["nbits"], "group_size": params["group_size"]})
        case "bitnet":
            return base_section("ternary")
        case "mxfp4":
            return base_section("mxfp4")
        case "bitsandbytes" if settings.get("load_in_8bit"):
            return base_section("int8")
        case "bitsandbytes":
            folder = locate(model.id, revision=model.revision, part="weights", code=model.trust_remote_code)
            return base_section(
                {
                    "format": settings.get("bnb_4bit_quant_type", "fp4"),
                    "double_quant": bool(settings.get("bnb_4bit_use_double_quant")),
                    "block_size": _read_block_size(folder),
                }
            )
    return NoBase()


def _read_block_size(folder: Path) -> int:
    """Returns the block size that bitsandbytes stores with each weight; its config does not name it."""
    for key, stored in read_index(folder).items():
        if ".quant_state.bitsandbytes__" in key:
            return int(json.loads(bytes(stored.read().tolist()))["blocksize"])
    return 64


def _refuse_config(config: PretrainedConfig, raw: dict[str, Any], model: ModelConfig, task: ModelTask | None) -> None:
    """Refuses quantized weights that cannot be read, and everything but models of text."""
    settings = raw.get("quantization_config") or {}
    quantizer = settings.get("quant_method", "bitsandbytes")
    if quantizer not in _KNOWN_QUANTIZERS:
        raise ModelError(
            f"The weights of {model.id} are quantized with {quantizer}, which Ingle cannot read.",
            where="model.id",
            fix="use the model's original weights in model.id, and set base.format (nf4, int8)",
        )
    if settings.get("use_rms_norm"):
        raise untrainable(model, "its BitNet layers have their own norms, which are not supported")
    reason = None if task is None else refusal(config, task, own_code=model.trust_remote_code)
    if reason is not None:
        raise untrainable(model, reason)


def untrainable(model: ModelConfig, reason: str) -> ModelError:
    """Returns the error for a model of a kind that cannot be trained."""
    return ModelError(
        f"{model.id} cannot be trained: {reason}.",
        where="model.id",
        fix="choose a model of text (Llama, Qwen, Gemma, Mixtral, ... for clm and sft; BERT, ModernBERT, ... for mlm)",
    )
