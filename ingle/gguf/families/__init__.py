"""llama.cpp's architectures that Ingle reads and writes, one record each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.families.falcon_h1 import FALCON_H1
from ingle.gguf.families.family import GgufFamily
from ingle.gguf.families.gemma import GEMMA, GEMMA2, GEMMA3
from ingle.gguf.families.gpt_oss import GPT_OSS
from ingle.gguf.families.granite import GRANITE, GRANITE_HYBRID, GRANITE_HYBRID_MOE, GRANITE_MOE
from ingle.gguf.families.lfm import LFM2
from ingle.gguf.families.llama import LLAMA, MIXTRAL
from ingle.gguf.families.mamba import MAMBA, MAMBA2
from ingle.gguf.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from ingle.gguf.families.qwen_hybrid import QWEN3_NEXT, QWEN35, QWEN35_MOE
from ingle.gguf.families.qwen_vl import QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, SECTIONS, WITH_AXES

#: Of two with the same name, the second one has experts.
FAMILIES = (
    *(LLAMA, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, QWEN35, QWEN35_MOE),
    *(QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE),
    *(GEMMA, GEMMA2, GEMMA3, GPT_OSS, GRANITE, GRANITE_MOE, GRANITE_HYBRID, GRANITE_HYBRID_MOE),
    *(LFM2, MAMBA, MAMBA2, FALCON_H1),
)

#: By model type of transformers; the one without experts where there are two.
BY_MODEL_TYPE = {model_type: family for family in reversed(FAMILIES) for model_type in family.model_types}


def family_of_config(config: Mapping[str, Any]) -> GgufFamily:
    """Returns the family of a model by its config.

    Raises:
        GgufError: The architecture is not supported.
    """
    family = BY_MODEL_TYPE.get(str(config.get("model_type")))
    if family is None:
        raise unsupported(str(config.get("model_type")), BY_MODEL_TYPE)
    if family.model_type in WITH_AXES and SECTIONS in (config.get("rope_parameters") or {}):
        return WITH_AXES[family.model_type]
    same = [each for each in FAMILIES if each.model_type == family.model_type]
    return same[-1] if config.get("num_local_experts") else family


def family_of_metadata(metadata: Mapping[str, Any]) -> GgufFamily:
    """Returns the family of a model by the metadata of its file.

    Raises:
        GgufError: The architecture is not supported.
    """
    architecture = metadata.get("general.architecture", "")
    found = [family for family in FAMILIES if family.architecture == architecture]
    if not found:
        raise unsupported(str(architecture)[:60], dict.fromkeys(family.architecture for family in FAMILIES))
    has_experts = bool(metadata.get(f"{architecture}.expert_count"))
    return found[-1] if has_experts else found[0]  # Mixtral is Llama with experts


def unsupported(architecture: str, known: Mapping[str, Any]) -> GgufError:
    """Returns the error for an unsupported architecture."""
    return GgufError(
        f"GGUF models of the architecture {architecture!r} are not supported.",
        why=f"supported are {', '.join(known)}",
        fix="use the model's safetensors release",
    )
