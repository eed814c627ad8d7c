"""Selects the modules of a model that an adapter section names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ingle.adapters.linear import is_linear
from ingle.adapters.states import Adapted
from ingle.errors import AdapterError
from ingle.planning.selection import matches, unread_by_peft
from ingle.quant.experts import QuantExperts
from ingle.quant.task_heads import task_heads
from ingle.wording import plural


@dataclass(frozen=True)
class Selection:
    """Paths of modules, in the model's order.

    Attributes:
        adapted: Linear layers that get an adapter.
        modules_to_save: Modules whose own weights are trained and saved, the head of a task among them; ``("",)`` in
            full fine-tuning.
        left_out: Linear layers that ``all-linear`` leaves out because PEFT could not read them back, and why.
        parameters: Parameters of other modules that are trained, such as biases.
    """

    adapted: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()


def trained_in_full(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Returns the modules that ``trainable_modules`` names, and the head of a task, which a pretrained model lacks.

    Raises:
        AdapterError: A pattern matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if not _inside_adapted(model, name)}
    trainable = {name: m for name, m in modules.items() if name and any(True for _ in m.parameters())}
    named = _match_all(patterns, trainable, "adapter.trainable_modules", "module", {})
    return (*named, *(name for name in task_heads(model) if name not in named))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers of a model, with an adapter or without, by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if not _inside_adapted(model, name)
        and is_linear((module.base or module) if isinstance(module, Adapted) else module)
    }


def select(
    model: nn.Module,
    targets: Literal["all-linear", "none"] | tuple[str, ...],
    trainable_modules: tuple[str, ...],
    *,
    option: str = "adapter.target_modules",
) -> Selection:
    """Applies ``target_modules`` and ``trainable_modules`` of an adapter section to a model.

    ``all-linear`` selects every linear layer except the output head, as in PEFT, and except those that PEFT could not
    read back; see :func:`unread_layers`.  Layers inside a trainable module get no adapter.

    Args:
        model: The model.
        targets: The layers to adapt.
        trainable_modules: The modules to train in full; the head of a task is always trained.
        option: The option that names the layers.

    Raises:
        AdapterError: A pattern matches nothing, or no layer is left to adapt.
    """
    to_save = trained_in_full(model, trainable_modules)
    linears = linear_layers(model)
    left_out: Mapping[str, str] = {}
    if targets == "none":
        if not to_save:
            raise AdapterError(
                "Nothing would be trained.",
                where="adapter.target_modules = none",
                fix="--adapter.target_modules=all-linear, or name the modules to train in adapter.trainable_modules",
            )
        adapted = []
    elif targets == "all-linear":
        head = output_head(model)
        left_out = unread_layers(model, linears)
        adapted = [name for name, module in linears.items() if module is not head and name not in left_out]
    else:
        modules = {name: module for name, module in model.named_modules() if not _inside_adapted(model, name)}
        adapted = _match_all(targets, linears, option, "linear layer", modules)
    adapted = [name for name in adapted if not any(name == m or name.startswith(f"{m}.") for m in to_save)]
    if not adapted and targets != "none":
        raise AdapterError(
            "There is no linear layer left to adapt.",
            where=option,
            why=f"{plural(len(linears), 'linear layer')}; trainable_modules: {', '.join(to_save) or 'none'}",
            fix="name other modules, or set adapter.kind to none to train all weights",
        )
    return Selection(tuple(adapted), to_save, left_out)


def unread_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Returns the linear layers that PEFT could not read back, and why; see :func:`unread_by_peft`."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    has_experts = any(_is_fused_experts(module) for module in model.modules())
    reasons = {name: unread_by_peft(name, kind, has_fused_experts=has_experts) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _is_fused_experts(module: nn.Module) -> bool:
    if "experts" not in type(module).__name__.lower():
        return False
    return isinstance(module, QuantExperts) or any(p.dim() == 3 for p in module.parameters(recurse=False))


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the layer that computes logits, if the model names one."""
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if callable(find) else None
    return head


def _inside_adapted(model: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return ".tuner." in name or (last == "base" and isinstance(model.get_submodule(parent), Adapted))


def _match_all(
    patterns: Iterable[str],
    candidates: Mapping[str, nn.Module],
    option: str,
    kind: str,
    others: Mapping[str, nn.Module],
) -> list[str]:
    """Returns the candidates that any pattern matches; ``others`` explain a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in candidates if name and matches(name, pattern)]
        if not hits:
            raise _no_match(pattern, candidates, option, kind, others)
        found.update(hits)
    return [name for name in candidates if name in found]


def _no_match(
    pattern: str, candidates: Mapping[str, nn.Module], option: str, kind: str, others: Mapping[str, nn.Module]
) -> AdapterError:
    names = sorted({name.rpartition(".")[2] for name in candidates} - {""})
    names = [name for name in names if not name.isdigit()]
    wide = [name for name in others if name and matches(name, pattern)]
    if wide:
        kinds = ", ".join(sorted({type(others[name]).__name__ for name in wide}))
        inside = any(name.startswith(f"{w}.") for w in wide for name in candidates)
        fix = f"{pattern}.* selects the linear layers inside" if inside else f"choose among {', '.join(names)}"
        if "expert" in kinds.lower():
            fix = "fused experts cannot be adapted yet: name the linear layers of attention, or use all-linear"
        return AdapterError(
            f"{pattern!r} matches {plural(len(wide), 'module')} of type {kinds}, but no {kind}.", where=option, fix=fix
        )
    close = difflib.get_close_matches(pattern.rpartition(".")[2], names, n=3)
    return AdapterError(
        f"{pattern!r} matches no {kind} of this model.",
        where=option,
        why=f"its names end in {', '.join(names)}",
        fix=f"did you mean {' or '.join(close)}?" if close else None,
    )
