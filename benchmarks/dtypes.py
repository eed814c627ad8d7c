"""The number type that a run would compute in on this machine."""

from __future__ import annotations

import torch

from ingle.models import compute_dtype

NAMES = ("auto", "bfloat16", "float32")


def run_dtype(name: str = "auto") -> torch.dtype:
    """What ``model.dtype`` means on this machine's CPU.

    Where the hardware does not multiply bfloat16, such a product takes fifty times as long as one of float32, and says
    nothing about a run, which would not use it.
    """
    return compute_dtype(name, "cpu")


def word(dtype: torch.dtype) -> str:
    """Its name without the library's."""
    return str(dtype).removeprefix("torch.")
