"""Turns the dropout of an architecture off, for losses that compare two models token by token."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> int:
    """Sets every dropout of a model to zero, also those that its code fixes instead of its config.

    The dropout of adapters stays: it is an option of the run, and is refused where it may not be set.

    Args:
        model: Its weights may be on the meta device.

    Returns:
        The number of dropouts that were on.
    """
    found = 0
    for module in model.modules():
        if type(module).__module__.startswith("ingle.adapters"):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found += module.p > 0
            module.p = 0.0
            continue
        for name, value in list(vars(module).items()):  # such as ``attention_dropout``, for a function
            if isinstance(value, float) and value > 0 and "drop" in name:
                setattr(module, name, 0.0)
                found += 1
    return found
