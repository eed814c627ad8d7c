"""How numba's kernels are compiled and where the result is kept."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite.binding import Linkage
from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder

from ingle.kernels.bfloat16 import FAST

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


def is_compiled(kernel: Kernel) -> bool:
    """Whether an earlier process has compiled a kernel and kept the result, for whatever kind of arguments."""
    dispatcher: Any = kernel
    folder = dispatcher.stats.cache_path  # None where nothing can be kept
    return folder is not None and any(Path(folder).glob(f"*.{dispatcher.py_func.__qualname__}-*.nbi"))


def _compile(function: Kernel, **options: Any) -> Kernel:
    options |= {"parallel": True, "nogil": True, "error_model": "numpy", "pipeline_class": _Compiler}
    # Numba looks at the file of the kernel alone; what is inlined from others has to be in the name it keeps it by.
    function.__qualname__ += f"-{_digest(Path(inspect.getfile(function)))}"
    try:
        compiled: Kernel = njit(cache=True, **options)(function)
    except RuntimeError:
        compiled = njit(**options)(function)
    return compiled


class _Compiler(CompilerBase):  # type: ignore[misc]
    """Lets the process that compiles a kernel run the very code that is kept of it."""

    def define_pipelines(self) -> list[Any]:
        code = _OwnCopies(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        code.enable_object_caching()
        self.state["library"] = code
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


class _OwnCopies(JITCodeLibrary):  # type: ignore[misc]
    """A kernel's machine code, which calls nothing outside of it that numba compiled.

    What a kernel calls, its loop's body above all, exists twice in the process that compiles it: optimised by itself,
    and copied into the kernel and optimised once more, where sums may come out in another order. The copy is kept, but
    by name the first would be called: a run that is resumed would end with other bits than one that was not stopped.
    """

    def _finalize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage in (Linkage.linkonce_odr, Linkage.weak_odr):
                function.linkage = Linkage.internal
        super()._finalize_final_module()


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
