"""Compilation of decoder layers, and whether the CPU kernels are compiled."""

from __future__ import annotations

import shutil

import torch

from ingle.kernels.layers.logits import score_rows
from ingle.kernels.numba.cache import is_compiled
from ingle.models import Model, decoder_layers


def can_compile(device: torch.device) -> bool:
    """Returns whether torch.compile works for a device; on a CPU it needs a C++ compiler."""
    if device.type == "cuda":
        return True
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def compile_layers(model: Model) -> None:
    """Compiles each decoder layer in place; layers of the same shape share the code."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def has_kernels() -> bool:
    """Returns whether an earlier run has compiled the CPU kernels; checks the loss kernel, which every run needs."""
    return is_compiled(score_rows)
