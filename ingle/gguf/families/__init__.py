"""llama.cpp's architectures that Ingle reads and writes, one record each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.families.bert import BERT
from ingle.gguf.families.falcon_h1 import FALCON_H1
from ingle.gguf.families.family import GgufFamily
from ingle.gguf.families.gemma import GEMMA, GEMMA2, GEMMA3
from ingle.gguf.families.gemma4 import GEMMA4
from ingle.gguf.families.gpt_oss import GPT_OSS
from ingle.gguf.families.granite import GRANITE, GRANITE_HYBRID, GRANITE_HYBRID_MOE, GRANITE_MOE
from ingle.gguf.families.lfm import LFM2
from ingle.gguf.families.llama import LLAMA, MIXTRAL
from ingle.gguf.families.mamba import MAMBA, MAMBA2
from ingle.gguf.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from ingle.gguf.families.qwen_hybrid import QWEN3_NEXT, QWEN35, QWEN35_MOE
from ingle.gguf.families.qwen_vl import QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, SECTIONS, WITH_AXES
from ingle.gguf.families.t5 import T5

#: Of two with the same name, the second one has experts.
FAMILIES = (
    *(LLAMA, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, QWEN35, QWEN35_MOE),
    *(QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE),
    *(GEMMA, GEMMA2, GEMMA3, GEMMA4, GPT_OSS, GRANITE, GRANITE_MOE, GRANITE_HYBRID, GRANITE_HYBRID_MOE),
    *(LFM2, MAMBA, MAMBA2, FALCON_H1),
    *(BERT, T5),
)

#: By model type of transformers; the one without experts where there are two.
BY_MODEL_TYPE = {model_type: family for family in reversed(FAMILIES) for model_type in family.model_types}

_ENCODER = "its files have neither the head that predicts masked tokens nor a task head"
_DIFFUSION = "it fills masks in many passes and does not predict the next token"
#: Why some architectures of llama.cpp are not supported; the others have no record here.
_REASONS = (
    dict.fromkeys(("nomic-bert", "nomic-bert-moe", "neo-bert", "modern-bert", "eurobert"), _ENCODER)
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
    return same[-1] if config.get("num_local_experts") else family


def family_of_metadata(metadata: Mapping[str, Any]) -> GgufFamily:
    """Returns the family of a model by the metadata of its file.

    Raises:
        GgufError: The architecture is not supported.
    """
    architecture = metadata.get("general.architecture", "")
    found = [family for family in FAMILIES if family.architecture == architecture]
    if not found:
        raise _unsupported(str(architecture)[:60])
    has_experts = bool(metadata.get(f"{architecture}.expert_count"))
    return found[-1] if has_experts else found[0]  # Mixtral is Llama with experts


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
