"""llama.cpp's architectures that Ingle reads and writes, one record each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.families.bert import BERT, MODERN_BERT, NOMIC_BERT
from ingle.gguf.families.classic import BLOOM, GPT2, MPT
from ingle.gguf.families.cohere import COHERE2, COMMAND_R
from ingle.gguf.families.falcon_h1 import FALCON_H1
from ingle.gguf.families.family import GgufFamily
from ingle.gguf.families.gemma import GEMMA, GEMMA2, GEMMA3
from ingle.gguf.families.gemma4 import GEMMA4, GEMMA4_MOE
from ingle.gguf.families.glm import GLM4, GLM4_MOE
from ingle.gguf.families.gpt_oss import GPT_OSS
from ingle.gguf.families.granite import GRANITE, GRANITE_HYBRID, GRANITE_HYBRID_MOE, GRANITE_MOE
from ingle.gguf.families.layer_norm import GPT_NEOX, NEMOTRON, PHI2, STABLELM, STARCODER2
from ingle.gguf.families.lfm import LFM2, LFM2_MOE
from ingle.gguf.families.llama import LLAMA, MIXTRAL
from ingle.gguf.families.llama_like import ARCEE, ERNIE4_5, EXAONE4, MINISTRAL3, MISTRAL3, SEED_OSS, SMOLLM3
from ingle.gguf.families.mamba import MAMBA, MAMBA2
from ingle.gguf.families.nemotron_h import NEMOTRON_H, NEMOTRON_H_MOE
from ingle.gguf.families.olmo import OLMO, OLMO2, OLMO3, OLMOE
from ingle.gguf.families.phi import PHI3
from ingle.gguf.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from ingle.gguf.families.qwen_hybrid import QWEN3_NEXT, QWEN35, QWEN35_MOE
from ingle.gguf.families.qwen_vl import QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, SECTIONS, WITH_AXES
from ingle.gguf.families.t5 import T5

#: Of two with the same model type, the second one has experts.
FAMILIES = (
    *(LLAMA, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, QWEN35, QWEN35_MOE),
    *(QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE),
    *(GEMMA, GEMMA2, GEMMA3, GEMMA4, GEMMA4_MOE, GPT_OSS, GRANITE, GRANITE_MOE, GRANITE_HYBRID, GRANITE_HYBRID_MOE),
    *(LFM2, LFM2_MOE, MAMBA, MAMBA2, FALCON_H1, NEMOTRON_H, NEMOTRON_H_MOE),
    *(MINISTRAL3, MISTRAL3, SMOLLM3, ARCEE, SEED_OSS, ERNIE4_5, EXAONE4, OLMO, OLMO2, OLMO3, OLMOE),
    *(PHI3, GLM4, GLM4_MOE, COMMAND_R, COHERE2, STARCODER2, STABLELM, NEMOTRON, PHI2, GPT_NEOX, GPT2, BLOOM, MPT),
    *(BERT, NOMIC_BERT, MODERN_BERT, T5),
)

#: By model type of transformers; the one without experts where there are two.
BY_MODEL_TYPE = {model_type: family for family in reversed(FAMILIES) for model_type in family.model_types}

_ENCODER = "its files have neither the head that predicts masked tokens nor a task head"
_DIFFUSION = "it fills masks in many passes and does not predict the next token"
#: Why some architectures of llama.cpp are not supported; the others have no record here.
_REASONS = (
    dict.fromkeys(("nomic-bert-moe", "neo-bert", "eurobert"), _ENCODER)
    | dict.fromkeys(("jina-bert-v2", "jina-bert-v3", "gemma-embedding", "llama-embed"), _ENCODER)
    | dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSION)
    | {"t5encoder": "its files have no decoder, so that no text is learned from them"}
    | {"clip": "it encodes images and is no text model", "wavtokenizer-dec": "it decodes audio and is no text model"}
)


def family_of_config(config: Mapping[str, Any]) -> GgufFamily:
    """Returns the family of a model by its config.

    Raises:
        GgufError: The architecture is not supported.
    """
    family = BY_MODEL_TYPE.get(str(config.get("model_type")))
    if family is None:
        raise _unsupported(str(config.get("model_type")))
    if family.model_type in WITH_AXES and SECTIONS in (config.get("rope_parameters") or {}):
        return WITH_AXES[family.model_type]
    same = [each for each in FAMILIES if each.model_type == family.model_type]
    return same[-1] if _has_experts(config) else family


def _has_experts(config: Mapping[str, Any]) -> bool:
    """Returns whether a config of an architecture with two families has experts."""
    if "layers_block_type" in config:
        return "moe" in config["layers_block_type"]
    return bool(config["enable_moe_block"] if "enable_moe_block" in config else config.get("num_local_experts"))


def family_of_metadata(metadata: Mapping[str, Any]) -> GgufFamily:
    """Returns the family of a model by the metadata of its file.

    Raises:
        GgufError: The architecture is not supported.
    """
    architecture = metadata.get("general.architecture", "")
    found = [family for family in FAMILIES if family.architecture == architecture]
    if not found:
        raise _unsupported(str(architecture)[:60])
    marked = [family for family in found if family.marker and metadata.get(f"{architecture}.{family.marker}")]
    return (marked or [family for family in found if not family.marker] or found)[0]


def supports(model_type: str) -> bool:
    """Returns whether models of a model type of transformers are read from GGUF files and written to them.

    Args:
        model_type: That of the text part for a multimodal model (``gemma3_text``).
    """
    return model_type in BY_MODEL_TYPE


def why_unsupported(name: str) -> str:
    """Returns the reason why an architecture is not supported.

    Args:
        name: That of llama.cpp, or a model type of transformers.
    """
    from gguf.constants import MODEL_ARCH_NAMES

    plain = _without_marks(name.removesuffix("_text"))
    known = {_without_marks(each): each for each in MODEL_ARCH_NAMES.values()}
    if plain not in known:
        return "llama.cpp has no architecture of this name"
    architecture = known[plain]
    return _REASONS.get(architecture, f"llama.cpp has the architecture {architecture}, but Ingle has no rules for it")


def _without_marks(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _unsupported(name: str) -> GgufError:
    return GgufError(
        f"GGUF models of the architecture {name!r} are not supported.",
        why=f"{why_unsupported(name)}; supported are {', '.join(sorted({each.architecture for each in FAMILIES}))}",
        fix="use the model's safetensors release; --to safetensors exports it",
    )
