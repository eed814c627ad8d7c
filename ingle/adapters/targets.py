"""Which modules of a model an adapter means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ingle.adapters.lora import LoraLinear, is_linear
from ingle.config.adapter import AdapterConfig, NoAdapter
from ingle.errors import AdapterError
from ingle.quant.experts import QuantExperts

#: What projections of experts were called before they were fused (Qwen 2 and DeepSeek, Mixtral).
_EXPERTS_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
#: Architectures whose linear maps of such names PEFT leaves alone; a test asks it.
_READ_ALIKE = {"qwen2_moe"}


@dataclass(frozen=True)
class Selection:
    """Paths of modules, in the model's order.

    Attributes:
        adapted: Linear maps that get an adapter.
        whole: Modules trained whole; the model itself (``""``) in full fine-tuning.
        left_out: Linear maps that ``all-linear`` leaves out because PEFT would take them for others.
    """

    adapted: tuple[str, ...]
    whole: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def select(model: nn.Module, adapter: AdapterConfig) -> Selection:
    """What ``attach`` would train: applies ``target_modules`` and ``trainable_modules``.

    ``all-linear`` is every linear map but the output head, as in PEFT, less those that PEFT would not read back: see
    :func:`named_like_experts`. What lies inside a module that is trained whole needs no adapter and gets none.

    Raises:
        AdapterError: When a pattern matches nothing, or nothing is left to adapt.
    """
    if isinstance(adapter, NoAdapter):
        return Selection((), ("",))
    modules = {name: module for name, module in model.named_modules() if not _inside_lora(model, name)}
    whole = _match_all(
        adapter.trainable_modules,
        {name: m for name, m in modules.items() if name and any(True for _ in m.parameters())},
        "adapter.trainable_modules",
        "module",
    )
    linears = {name: m for name, m in modules.items() if isinstance(m, LoraLinear) or is_linear(m)}
    left_out: tuple[str, ...] = ()
    if adapter.target_modules == "all-linear":
        head = output_head(model)
        left_out = named_like_experts(model, linears)
        adapted = [name for name, module in linears.items() if module is not head and name not in left_out]
    else:
        adapted = _match_all(adapter.target_modules, linears, "adapter.target_modules", "linear map", modules)
    adapted = [name for name in adapted if not any(name == w or name.startswith(f"{w}.") for w in whole)]
    if not adapted:
        raise AdapterError(
            "There is no linear map left to adapt.",
            where="adapter.target_modules",
            why=f"{len(linears)} linear maps; trained whole: {', '.join(whole) or 'none'}",
            fix="name other modules, or set adapter.kind to none to train everything",
        )
    return Selection(tuple(adapted), tuple(whole), left_out)


def named_like_experts(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of some linear maps that PEFT would take for projections of fused experts.

    Experts were linear maps once, and are one stacked parameter now. PEFT translates their old names in an adapter's
    ``target_modules`` and drops every other linear map that ends in the same name: the dense layers and the shared
    experts of most mixture-of-experts architectures.

    Source: PEFT 0.21, ``_convert_peft_config_moe``; which architectures it does so for, transformers'
    ``_MODEL_TO_CONVERSION_PATTERN`` decides.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _READ_ALIKE or not any(_holds_stack(module) for module in model.modules()):
        return ()
    return tuple(name for name in names if name.rpartition(".")[2] in _EXPERTS_NAMES)


def _holds_stack(module: nn.Module) -> bool:
    """Whether a module is fused experts, packed or not."""
    if "experts" not in type(module).__name__.lower():
        return False
    return isinstance(module, QuantExperts) or any(p.dim() == 3 for p in module.parameters(recurse=False))


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern fits a module's path or the end of it, at a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model says so."""
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if callable(find) else None
    return head


def _inside_lora(model: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last == "base" and isinstance(model.get_submodule(parent), LoraLinear)


def _match_all(
    patterns: Iterable[str],
    candidates: dict[str, nn.Module],
    where: str,
    kind: str,
    others: dict[str, nn.Module] | None = None,
) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in candidates if name and matches(name, pattern)]
        if not hits:
            raise _nothing_matches(pattern, candidates, where, kind, others or {})
        found.update(hits)
    return [name for name in candidates if name in found]


def _nothing_matches(
    pattern: str, candidates: dict[str, nn.Module], where: str, kind: str, others: dict[str, nn.Module]
) -> AdapterError:
    names = sorted({name.rpartition(".")[2] for name in candidates if name} - {""})
    names = [name for name in names if not name.isdigit()]
    wide = [name for name in others if name and matches(name, pattern)]
    if wide:
        kinds = ", ".join(sorted({type(others[name]).__name__ for name in wide}))
        inside = any(name.startswith(f"{w}.") for w in wide for name in candidates)
        fix = f"{pattern}.* takes the linear maps inside" if inside else f"choose among {', '.join(names)}"
        if "expert" in kinds.lower():
            fix = "fused experts cannot be adapted yet: name the attention's linear maps, or use all-linear"
        return AdapterError(
            f"{pattern!r} matches {len(wide)} module{'s' * (len(wide) > 1)} of kind {kinds}, but no {kind}.",
            where=where,
            fix=fix,
        )
    close = difflib.get_close_matches(pattern.rpartition(".")[2], names, n=3)
    return AdapterError(
        f"{pattern!r} matches no {kind} of this model.",
        where=where,
        why=f"its names end in {', '.join(names)}",
        fix=f"did you mean {' or '.join(close)}?" if close else None,
    )
