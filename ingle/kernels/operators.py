"""Registers kernels as opaque operators for ``torch.compile``, so that its graphs only contain quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library


def opaque(name: str, kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Registers a kernel that writes ``out``, its last argument, as the operator ``ingle::name``.

    Args:
        name: Name of the operator.
        kernel: A function with annotations, from which torch derives the operator's schema.

    Returns:
        A function that runs the kernel and returns ``out``. It uses the operator only while compiling, because calling
        an operator takes longer than a small kernel.
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
