"""The compute dtype of a run on this machine."""

from __future__ import annotations

import torch

from ingle.models import compute_dtype

NAMES = ("auto", "bfloat16", "float32")


def run_dtype(name: str = "auto") -> torch.dtype:
    """Returns the dtype that ``model.dtype`` resolves to on this machine's CPU.

    On hardware without bfloat16 products, they take fifty times as long as those of float32. A run would not use them,
    so timing them says nothing about it.
    """
    return compute_dtype(name, "cpu")


def word(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without the prefix ``torch.``."""
    return str(dtype).removeprefix("torch.")
