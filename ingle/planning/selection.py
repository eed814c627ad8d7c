"""Which modules an adapter section names, by their paths."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

#: Names of the experts' projections before transformers fused them (Qwen 2 and DeepSeek; Mixtral).
EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
#: Architectures in which PEFT does not change linear layers of these names; a test compares the list with PEFT.
UNAFFECTED = frozenset({"qwen2_moe"})
#: Architectures of Mamba layers whose output projections PEFT refuses to adapt: the CUDA kernel reads their weights
#: without calling them. A test compares the list with PEFT.
MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
MAMBA_OUTPUT = "out_proj"


def matches(path: str, pattern: str) -> bool:
    """Returns whether a pattern matches a module's path, or its end after a dot."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def unread_by_peft(path: str, model_type: str | None, *, has_fused_experts: bool) -> str | None:
    """Returns why PEFT could not read back an adapter of a linear layer; None if it can.

    Experts used to be linear layers and are now one stacked parameter. PEFT translates their old names in an adapter's
    ``target_modules`` and drops every other linear layer whose path ends in the same name: the dense layers and the
    shared experts of most mixture-of-experts architectures.

    Source: PEFT 0.21, ``_convert_peft_config_moe`` (transformers' ``_MODEL_TO_CONVERSION_PATTERN`` decides which
    architectures are affected) and ``_check_lora_target_modules_mamba``.
    """
    name = path.rpartition(".")[2]
    if has_fused_experts and model_type not in UNAFFECTED and name in EXPERT_NAMES:
        return "PEFT confuses them with the fused experts and computes something else"
    if model_type in MAMBA_TYPES and name == MAMBA_OUTPUT:
        return "PEFT refuses them, because the CUDA kernels of Mamba read their weights without calling them"
    return None


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Returns whether a path is that of one of the modules or of a part of it."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)
