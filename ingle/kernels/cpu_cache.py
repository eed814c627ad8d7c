"""How numba's kernels are compiled and where the result is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compile_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a parallel kernel at its first call for a kind of arguments.

    The result is kept beside the source, or in numba's folder in the user's cache where that cannot be written;
    where neither can be, every process compiles anew.
    """
    options: dict[str, Any] = {"parallel": True, "nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:
        compiled = njit(**options)(function)
    return compiled
