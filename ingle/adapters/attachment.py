"""Puts an adapter on a model and says exactly what that did.

What is frozen, adapted, trained whole and left alone is decided here, once, and reported: a linear map that
silently stays as it was is the commonest way a fine-tuning learns nothing.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ingle.adapters.adapted import AttachReport, adapt, report, train_whole
from ingle.adapters.peft_files import load_adapter
from ingle.adapters.targets import select
from ingle.config.adapter import AdapterConfig, NoAdapter, QaLoraAdapter
from ingle.config.base import folding_formats
from ingle.errors import AdapterError
from ingle.quant.linear import QuantLinear, QuantModule


def attach(model: nn.Module, adapter: AdapterConfig, *, seed: int) -> AttachReport:
    """Freezes the base and adds what is trained; with adapter ``none``, everything is trained.

    Args:
        model: The model, with its weights in place.
        adapter: What to train; where it has a ``path``, the adapter starts from that folder.
        seed: Of the initialisation of A.

    Raises:
        AdapterError: When a pattern matches nothing, a packed weight would have to be trained, a format cannot take
            a QA-LoRA change, or the adapter to start from does not fit.
    """
    if isinstance(adapter, NoAdapter):
        return _train_everything(model)
    selection = select(model, adapter)
    model.requires_grad_(False)
    sizes = _group_sizes(model, selection.adapted) if isinstance(adapter, QaLoraAdapter) else {}
    for name in selection.adapted:
        lora = adapt(model, name, adapter.rank, adapter.scale, adapter.dropout, group_size=sizes.get(name, 1))
        lora.initialise(seed, name)
    notes = train_whole(model, selection.modules_to_save)
    if adapter.path is not None:
        notes += load_adapter(model, Path(adapter.path), allow_mismatch=adapter.allow_mismatch).notes
    return report(model, selection, notes)


def _group_sizes(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    """The groups of each layer's format, whose changes it can take exactly."""
    sizes: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name in names:
        module = model.get_submodule(name)
        module = getattr(module, "base", module)
        format = module.format if isinstance(module, QuantLinear) else None
        if format is not None and format.additive_field is not None:
            sizes[name] = format.additive_field
        else:
            refused[name] = "none" if format is None else format.name
    if refused:
        shown = [f"{name} is held in {format}" for name, format in list(refused.items())[:3]]
        more = f"\nand {len(refused) - 3} more" if len(refused) > 3 else ""
        raise AdapterError(
            f"QA-LoRA cannot be folded into {', '.join(sorted(set(refused.values())))}: no free offset for each group.",
            where="adapter.kind = qa_lora",
            why="\n".join(shown) + more,
            fix=f"hold them in {' or '.join(folding_formats())}, name other target_modules, or --adapter.kind=lora",
        )
    return sizes


def _train_everything(model: nn.Module) -> AttachReport:
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            raise AdapterError(
                f"{name} is held in {module.format.name} and cannot be trained.",
                where="adapter.kind = none",
                fix="train an adapter (--adapter.kind=lora), or set base.format to none and start from plain weights",
            )
    model.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters())
    return AttachReport((), ("",), (), (), trainable)
