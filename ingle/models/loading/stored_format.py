"""What a published checkpoint is packed in, so that it can be opened without being told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingle.config.base import BaseConfig, NoBase, base_section
from ingle.config.model import ModelConfig
from ingle.models.boundary import reading
from ingle.models.loading.architecture import read_json
from ingle.models.loading.gguf_model import is_gguf
from ingle.models.loading.hub import locate
from ingle.models.loading.safetensors_files import read_index

_STATE = ".quant_state.bitsandbytes__"


def stored_base(model: ModelConfig) -> BaseConfig:
    """The base section that holds a checkpoint's linear maps as they are stored; none where they are plain.

    What only the bytes of the weights tell of a GGUF file is none too: each tensor names its own type.

    Raises:
        ModelError: There is no such model.
        HubUnavailable: When the hub is needed and cannot be reached.
    """
    if is_gguf(model.id):
        return NoBase()
    folder = locate(model.id, revision=model.revision, code=model.trust_remote_code)
    settings = read_json(folder, model).get("quantization_config") or {}
    fix = "fetch config.json again; its quantization_config is damaged"
    with reading(folder / "config.json", "The way that the weights are packed cannot be read.", fix=fix):
        return _stored_as(settings, model)


def _stored_as(settings: Mapping[str, Any], model: ModelConfig) -> BaseConfig:
    match settings.get("quant_method"):
        case "hqq":
            params = settings["quant_config"]["weight_quant_params"]
            return base_section({"format": "hqq", "bits": params["nbits"], "group_size": params["group_size"]})
        case "bitnet":
            return base_section("ternary")
        case "bitsandbytes" if settings.get("load_in_8bit"):
            return base_section("int8")
        case "bitsandbytes":
            weights = locate(model.id, revision=model.revision, part="weights", code=model.trust_remote_code)
            return base_section(
                {
                    "format": settings.get("bnb_4bit_quant_type", "fp4"),
                    "double_quant": bool(settings.get("bnb_4bit_use_double_quant")),
                    "block_size": _block_size(weights),
                }
            )
    return NoBase()


def _block_size(folder: Path) -> int:
    """What bitsandbytes keeps beside the first weight it packed; the config does not name the size of a block."""
    for key, stored in read_index(folder).items():
        if _STATE in key:
            return int(json.loads(bytes(stored.read().tolist()))["blocksize"])
    return 64
