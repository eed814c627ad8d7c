"""``adapter_config.json`` as PEFT writes and reads it.

What cannot be computed exactly (DoRA, trained biases, bases that the initialisation changed, ...) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ingle.adapters.adapted import lora_modules
from ingle.adapters.lora import is_linear
from ingle.config.adapter import LowRankAdapter
from ingle.errors import AdapterError
from ingle.quant.conversion import is_conv1d

CONFIG = "adapter_config.json"

#: Settings of PEFT's that change the arithmetic, with the value that leaves it plain.
_MUST_BE_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def make_settings(
    model: nn.Module, adapter: LowRankAdapter, base_model_id: str, whole: tuple[str, ...]
) -> dict[str, Any]:
    """What PEFT needs to know about the adapters of a model.

    Args:
        model: With its adapters.
        adapter: What they were attached with.
        base_model_id: Hub id or folder of the base.
        whole: Paths of the modules trained whole.
    """
    modules = lora_modules(model)
    odd = {name: m for name, m in modules.items() if m.rank != adapter.rank or m.scale != adapter.scale}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_id,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha_of(adapter.scale, adapter.rank, adapter.rslora),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(module.base) for module in modules.values()),
        "target_modules": _shortest_names(model, set(modules)),
        "modules_to_save": list(whole) or None,
        "init_lora_weights": True,
        "rank_pattern": {name: m.rank for name, m in odd.items() if m.rank != adapter.rank},
        "alpha_pattern": {name: alpha_of(m.scale, m.rank, adapter.rslora) for name, m in odd.items()},
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder.

    Raises:
        AdapterError: There are none, they are damaged, or they describe what cannot be computed exactly.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} holds no adapter.",
            where=str(path),
            fix="give a folder with adapter_config.json and adapter_model.safetensors in it",
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"adapters of type {kind} are not supported yet, only LORA.", where=f"{path}: peft_type")
        if not (isinstance(settings.get("r"), int) and isinstance(settings.get("lora_alpha"), int | float)):
            raise AdapterError("r or lora_alpha is missing.", where=str(path), fix="the file is damaged: copy it again")
    except (ValueError, AttributeError) as error:
        raise AdapterError("the adapter's config cannot be read.", where=str(path), why=str(error)) from None
    for key, plain in _MUST_BE_PLAIN.items():
        value = settings.get(key, plain[0])
        if value not in plain:
            raise AdapterError(
                f"this adapter uses {key} = {value!r}, which is not supported yet.",
                where=f"{path}: {key}",
                why="without it the model would answer differently from the one that was trained",
                fix="merge it into its base with PEFT, or train a plain LoRA",
            )
    return dict(settings)


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha that gives this scale."""
    alpha = scale * rank**0.5 if rslora else scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def scale_of(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Scale of one module; ``alpha_pattern`` may single it out."""
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / rank**0.5 if settings.get("use_rslora") else float(alpha) / rank


def _shortest_names(model: nn.Module, names: set[str]) -> list[str]:
    """Last parts of the paths where they single out the adapted modules, whole paths otherwise."""
    others = {n.removesuffix(".base") for n, module in model.named_modules() if is_linear(module)} - names
    short: set[str] = set()
    for name in names:
        last = name.rpartition(".")[2]
        ambiguous = any(other.rpartition(".")[2] == last for other in others) or last.isdigit()
        short.add(name if ambiguous else last)
    return sorted(short)
