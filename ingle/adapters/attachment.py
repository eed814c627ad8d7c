"""Puts an adapter on a model and says exactly what that did.

What is frozen, adapted, trained whole and left alone is decided here, once, and reported: a linear map that
silently stays as it was is the commonest way a fine-tuning learns nothing.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ingle.adapters.adapted import AttachReport, adapt, report, train_whole
from ingle.adapters.files import load_adapter
from ingle.adapters.targets import select
from ingle.config.adapter import AdapterConfig, NoAdapter
from ingle.errors import AdapterError
from ingle.quant.linear import Packed


def attach(model: nn.Module, adapter: AdapterConfig, *, seed: int) -> AttachReport:
    """Freezes the base and adds what is trained; with adapter ``none``, everything is trained.

    Args:
        model: The model, with its weights in place.
        adapter: What to train; where it has a ``path``, the adapter starts from that folder.
        seed: Of the initialisation of A.

    Raises:
        AdapterError: When a pattern matches nothing, a packed weight would have to be trained, or the adapter
            to start from does not fit.
    """
    if isinstance(adapter, NoAdapter):
        return _train_everything(model)
    selection = select(model, adapter)
    model.requires_grad_(False)
    for name in selection.adapted:
        adapt(model, name, adapter.rank, adapter.scale, adapter.dropout).initialise(seed, name)
    notes = train_whole(model, selection.whole)
    if adapter.path is not None:
        load_adapter(model, Path(adapter.path))
    return report(model, selection, notes)


def _train_everything(model: nn.Module) -> AttachReport:
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            raise AdapterError(
                f"{name} is held in {module.format.name} and cannot be trained.",
                where="adapter.kind = none",
                fix="set base.format to none, or train an adapter: --adapter.kind=lora",
            )
    model.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters())
    return AttachReport((), ("",), (), (), trainable)
