"""``adapter_config.json`` as PEFT writes and reads it.

What cannot be computed exactly (DoRA, trained biases, bases that the initialisation changed, ...) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ingle.adapters.adapted import lora_modules
from ingle.adapters.lora import is_linear
from ingle.config.adapter import LowRankAdapter
from ingle.errors import AdapterError
from ingle.quant.conversion import is_conv1d

CONFIG = "adapter_config.json"


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from None
    return pattern


T = TypeVar("T")
_Rank = Annotated[int, Field(ge=1)]
_LayerPattern = Annotated[str, AfterValidator(_check_pattern)]
_Pattern = Annotated[_LayerPattern, Field(min_length=1)]


class Settings(BaseModel):
    """The part of ``adapter_config.json`` that decides what an adapter computes, under PEFT's names.

    Source: ``LoraConfig`` and ``check_target_module_exists`` of the PEFT library.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore")

    r: _Rank
    lora_alpha: float
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    use_rslora: bool | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, float] | None = None
    target_modules: list[str] | _Pattern | None = None
    exclude_modules: list[str] | _Pattern | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[_LayerPattern] | _LayerPattern | None = None
    modules_to_save: list[Annotated[str, Field(min_length=1)]] | None = None
    ensure_weight_tying: bool | None = None

    def rank_of(self, name: str) -> int:
        """Rank of the module at path ``name``; ``rank_pattern`` overrides ``r``."""
        return _override(self.rank_pattern, name, self.r)

    def scale_of(self, name: str, rank: int) -> float:
        """Factor in front of ``x A^T B^T`` of the module at path ``name``; ``alpha_pattern`` overrides its alpha."""
        alpha = _override(self.alpha_pattern, name, self.lora_alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    def is_target(self, name: str) -> bool:
        """Whether the module at path ``name`` carries an adapter."""
        saved = self.modules_to_save or ()
        if any(re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", name) for module in saved):
            return False
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        if self.target_modules in (None, "all-linear"):
            return True
        assert self.target_modules is not None
        if not _matches(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return True
        return self._is_in_a_chosen_layer(name)

    def _is_in_a_chosen_layer(self, name: str) -> bool:
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not layers:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in [each for each in patterns or () if each] or [r"[^.]*"]:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
            if match:
                return int(match["index"]) in layers
        return False


def _matches(modules: list[str] | str, name: str) -> bool:
    """Whether a regular expression matches a whole path, or one of the names in a list ends it."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _override(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value of the first pattern that matches the end of a path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


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


def read_settings(folder: Path) -> Settings:
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
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        kind = values.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"Adapters of type {str(kind)[:40]} are not supported yet, only LORA.", where=f"{path}: peft_type"
            )
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(
            "The adapter's config cannot be read.", where=str(path), why=str(error), fix="copy the file again"
        ) from None
    for key, plain in _MUST_BE_PLAIN.items():
        value = values.get(key, plain[0])
        if value not in plain:
            raise AdapterError(
                f"This adapter uses {key} = {value!r}, which is not supported yet.",
                where=f"{path}: {key}",
                why="without it the model would answer differently from the one that was trained",
                fix="merge it into its base with PEFT, or train a plain LoRA",
            )
    try:
        return Settings.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[-1]  # of a union, the last member is the one that explains most
        raise AdapterError(
            "The adapter's config holds a value that no adapter can have.",
            where=f"{path}: {'.'.join(map(str, problem['loc'][:2]))}",
            why=f"{problem['msg']}; the file says {repr(problem['input'])[:60]}",
            fix="copy the file again, or save the adapter again with PEFT",
        ) from None


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha that gives this scale."""
    alpha = scale * rank**0.5 if rslora else scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _shortest_names(model: nn.Module, names: set[str]) -> list[str]:
    """Last parts of the paths where they single out the adapted modules, whole paths otherwise."""
    others = {n.removesuffix(".base") for n, module in model.named_modules() if is_linear(module)} - names
    short: set[str] = set()
    for name in names:
        last = name.rpartition(".")[2]
        ambiguous = any(other.rpartition(".")[2] == last for other in others) or last.isdigit()
        short.add(name if ambiguous else last)
    return sorted(short)
