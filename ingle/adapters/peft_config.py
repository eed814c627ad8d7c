"""Reads and writes PEFT's ``adapter_config.json``.

Settings that Ingle cannot compute exactly (trained biases, initializations that change the base, ...) are refused
by name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeVar

import regex  # type: ignore[import-untyped]
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from torch import nn

from ingle.adapters.adapted import lora_modules
from ingle.adapters.head_files import task_type
from ingle.adapters.linear import is_linear
from ingle.config.adapter import DoraAdapter, LowRankAdapter
from ingle.errors import AdapterError
from ingle.quant.conversion import is_conv1d

CONFIG_FILE = "adapter_config.json"
#: PEFT's ``target_modules`` of an adapter that consists of ``modules_to_save`` alone.
NO_TARGETS = "dummy-target-modules"

#: Time that all regular expressions of one config may take.
MATCHING_TIME_S = 2.0
#: Largest number of characters in a pattern, and largest product of its counted repetitions, which ``regex`` expands.
MAX_PATTERN_SIZE = 10_000


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from None
    repeats = prod(int(high or low or 1) for low, high in re.findall(r"\{(\d*),?(\d*)\}", pattern))
    if max(len(pattern), repeats) > MAX_PATTERN_SIZE:
        raise ValueError(f"{pattern[:80]!r} is too long or repeats too often")
    return pattern


T = TypeVar("T")
_Rank = Annotated[int, Field(ge=1)]
_LayerPattern = Annotated[str, AfterValidator(_check_pattern)]
_Pattern = Annotated[_LayerPattern, Field(min_length=1)]


class PeftConfig(BaseModel):
    """The part of ``adapter_config.json`` that determines what an adapter computes, under PEFT's names.

    Source: ``LoraConfig`` and ``check_target_module_exists`` of the PEFT library.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore")

    r: _Rank
    lora_alpha: float
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, float] | None = None
    target_modules: list[str] | _Pattern | None = None
    exclude_modules: list[str] | _Pattern | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[_LayerPattern] | _LayerPattern | None = None
    modules_to_save: list[Annotated[str, Field(min_length=1)]] | None = None
    ensure_weight_tying: bool | None = None

    _matching_s: float = PrivateAttr(0.0)

    def rank_of(self, name: str) -> int:
        """Returns the rank of the module at path ``name``; ``rank_pattern`` overrides ``r``."""
        return self._override(self.rank_pattern, name, self.r)

    def scale_of(self, name: str, rank: int) -> float:
        """Returns the factor of ``x A^T B^T`` for the module at path ``name``; ``alpha_pattern`` overrides alpha."""
        alpha = self._override(self.alpha_pattern, name, self.lora_alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    def is_target(self, name: str) -> bool:
        """Returns whether the module at path ``name`` has an adapter."""
        if any(f".{module}." in f".{name}." for module in self.modules_to_save or ()):
            return False
        if self.exclude_modules and self._names(self.exclude_modules, name):
            return False
        targets = self.target_modules
        if targets == NO_TARGETS:
            return False
        if targets is None or targets == "all-linear":
            return True
        if not self._names(targets, name):
            return False
        return isinstance(targets, str) or name in targets or self._is_in_a_chosen_layer(name)

    def _is_in_a_chosen_layer(self, name: str) -> bool:
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not layers:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in [each for each in patterns or () if each] or [r"[^.]*"]:
            match = self._match(regex.match, rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
            if match:
                return int(match["index"]) in layers
        return False

    def _names(self, modules: list[str] | str, name: str) -> bool:
        """Returns whether a regular expression matches the whole path, or an entry of a list ends it."""
        if isinstance(modules, str):
            return self._match(regex.fullmatch, modules, name) is not None
        return any(name == module or name.endswith(f".{module}") for module in modules)

    def _override(self, patterns: Mapping[str, T] | None, name: str, default: T) -> T:
        """Returns the value of the first pattern that matches the end of a path."""
        for pattern, value in (patterns or {}).items():
            if self._match(regex.match, rf"(.*\.)?({pattern})$", name):
                return value
        return default

    def _match(self, function: Callable[..., Any], pattern: str, name: str) -> Any:
        """Matches with ``regex``, which can stop a search that backtracks for minutes; ``re`` cannot in a thread."""
        began = time.monotonic()
        try:
            return function(pattern, name, timeout=max(0.01, MATCHING_TIME_S - self._matching_s))
        except (TimeoutError, regex.error, RecursionError, MemoryError) as error:
            raise AdapterError(
                "A regular expression in the adapter's config cannot be matched in time.",
                where=f"{CONFIG_FILE}: {pattern[:80]}",
                why=f"{error or type(error).__name__}; the limit for all patterns is {MATCHING_TIME_S:g} s",
                fix="list the module names in target_modules instead, without nested repetition such as (a+)+",
            ) from None
        finally:
            self._matching_s += time.monotonic() - began


#: PEFT settings that change the arithmetic, with the values that do not.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora"), (None,)),
    **dict.fromkeys(("arrow_config", "kasa_config", "velora_config", "monteclora_config"), (None,)),
    "bias": ("none", None),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def describe_adapter(
    model: nn.Module,
    adapter: LowRankAdapter,
    base_model_id: str,
    modules_to_save: tuple[str, ...],
    *,
    is_role: bool = False,
) -> dict[str, Any]:
    """Returns the content of ``adapter_config.json`` for the adapters of a model.

    Args:
        model: Model with its adapters.
        adapter: Adapter section that was attached.
        base_model_id: Hub id or folder of the base.
        modules_to_save: Paths of the modules whose own weights were trained.
        is_role: Whether this is a role, which has one rank and one scale.
    """
    modules = lora_modules(model)
    # What is subtracted is saved with the adapter, which so has twice the rank.
    times = 2 if adapter.subtracts else 1
    odd = {
        name: m for name, m in modules.items() if not is_role and (m.rank != adapter.rank or m.scale != adapter.scale)
    }
    config = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base_model_id,
        "inference_mode": True,
        "r": times * adapter.rank,
        "lora_alpha": alpha_of(adapter.scale, times * adapter.rank, adapter.rslora),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(module.base) for module in modules.values()),
        "target_modules": _shortest_names(model, set(modules)) if modules else NO_TARGETS,
        "modules_to_save": list(modules_to_save) or None,
        "init_lora_weights": True,
        "rank_pattern": {name: times * m.rank for name, m in odd.items() if m.rank != adapter.rank},
        "alpha_pattern": {name: alpha_of(m.scale, times * m.rank, adapter.rslora) for name, m in odd.items()},
    }
    return config | {"use_dora": True} if isinstance(adapter, DoraAdapter) else config


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of an adapter folder.

    Raises:
        AdapterError: The config is missing or damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} contains no adapter.",
            where=str(path),
            fix="name a folder that contains adapter_config.json and adapter_model.safetensors",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            "The adapter's config cannot be read.", where=str(path), why=str(error), fix="copy the file again"
        ) from None
    return values


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the config of an adapter folder.

    Raises:
        AdapterError: The config is missing or damaged, or describes an adapter that cannot be computed exactly.
    """
    values, path = read_config(folder), folder / CONFIG_FILE
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"Adapters of type {str(kind)[:40]} are not supported.", where=f"{path}: peft_type")
    for key, plain in _PLAIN_VALUES.items():
        value = values.get(key, plain[0])
        if value not in plain:
            raise AdapterError(
                f"This adapter uses {key} = {value!r}, which is not supported yet.",
                where=f"{path}: {key}",
                why="without it the model would answer differently from the trained one",
                fix="merge the adapter into its base with PEFT, or train a plain LoRA",
            )
    try:
        return PeftConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        problem = error.errors(include_url=False)[-1]  # the error about the last type of a union is the clearest
        raise AdapterError(
            "The adapter's config contains an invalid value.",
            where=f"{path}: {'.'.join(map(str, problem['loc'][:2]))}",
            why=f"{problem['msg']}; found {repr(problem['input'])[:60]}",
            fix="copy the file again, or save the adapter again with PEFT",
        ) from None


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """Returns the alpha that gives a scale."""
    alpha = scale * rank**0.5 if rslora else scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _shortest_names(model: nn.Module, names: set[str]) -> list[str]:
    """Returns the last parts of the paths where they identify the adapted modules, and full paths otherwise.

    Of a multimodal model only the text part is here. The layers of its towers have the same last parts, and PEFT would
    adapt them too.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config:
        return sorted(names)
    others = {n.removesuffix(".base") for n, module in model.named_modules() if is_linear(module)} - names
    short: set[str] = set()
    for name in names:
        last = name.rpartition(".")[2]
        ambiguous = any(other.rpartition(".")[2] == last for other in others) or last.isdigit()
        short.add(name if ambiguous else last)
    return sorted(short)
