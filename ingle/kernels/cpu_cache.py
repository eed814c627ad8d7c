"""How numba's kernels are compiled and where the result is kept."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

#: Float rules of the kernels: sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning.
FAST = {"contract", "nsz", "arcp", "reassoc"}

Kernel = Callable[..., Any]

_OWN_IMPORT = re.compile(r"^from ingle\.kernels\.(\w+) import", re.MULTILINE)


def compile_kernel(function: Kernel) -> Kernel:
    """Compiles a parallel kernel at its first call for a kind of arguments.

    The result is kept beside the source, or in numba's folder in the user's cache where that cannot be written;
    where neither can be, every process compiles anew.
    """
    return _compile(function)


def compile_float_kernel(function: Kernel) -> Kernel:
    """As :func:`compile_kernel`, and floating-point sums may be taken in another order."""
    return _compile(function, fastmath=FAST)


def inline_float(function: Kernel) -> Kernel:
    """A function that float kernels call, always made part of them.

    Left to stand alone it exists twice: within the kernel, which is what is kept, and by itself, which is what runs in
    the process that compiles it. The two take their sums in different orders, and a run that was resumed would end
    with other bits than the one that was not stopped.
    """
    inlined: Kernel = njit(fastmath=FAST, error_model="numpy", forceinline=True)(function)
    return inlined


def _compile(function: Kernel, **options: Any) -> Kernel:
    options |= {"parallel": True, "nogil": True, "error_model": "numpy"}
    # Numba looks at the file of the kernel alone; what is inlined from others has to be in the name it keeps it by.
    function.__qualname__ += f"-{_digest(Path(inspect.getfile(function)))}"
    try:
        compiled: Kernel = njit(cache=True, **options)(function)
    except RuntimeError:
        compiled = njit(**options)(function)
    return compiled


def _digest(path: Path, folder: Path = Path(__file__).parent) -> str:
    """Stands for the text of every file in ``folder`` that the one at ``path`` imports from, however indirectly."""
    texts: dict[str, str] = {path.stem: path.read_text(encoding="utf-8")}
    waiting = [path.stem]
    while waiting:
        for name in _OWN_IMPORT.findall(texts[waiting.pop()]):
            if name not in texts:
                texts[name] = (folder / f"{name}.py").read_text(encoding="utf-8")
                waiting.append(name)
    del texts[path.stem]
    return hashlib.blake2b("".join(texts[name] for name in sorted(texts)).encode(), digest_size=4).hexdigest()
