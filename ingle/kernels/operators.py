"""Kernels as operators that ``torch.compile`` does not look into, so that a graph holds quantized weights only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library


def opaque(name: str, kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Registers a kernel that writes ``out``, its last argument, as the operator ``ingle::name``.

    Args:
        name: Of the operator.
        kernel: Annotated, because torch derives the operator's schema from the annotations.

    Returns:
        Runs the kernel and returns ``out``. It uses the operator while compiling only: calling one takes longer than a
        small kernel.
    """
    library.custom_op(f"ingle::{name}", kernel, mutates_args=("out",)).register_fake(lambda *_: None)
    operator = getattr(torch.ops.ingle, name)

    def run(*arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            operator(*arguments)
        else:
            kernel(*arguments)
        out: Tensor = arguments[-1]
        return out

    return run
