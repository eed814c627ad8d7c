"""How numba's kernels are compiled and where the result is kept."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite.binding import Linkage
from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder

from ingle.kernels.numba.bfloat16 import FAST

Kernel = Callable[..., Any]

#: Folder of the package ``ingle``.
_PACKAGE = Path(__file__).parents[2]

#: Syntax that may contain a statement.
_HOLD_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


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
    function.__qualname__ += f"-{imports_digest(Path(inspect.getfile(function)))}"
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


def imports_digest(path: Path, package: Path = _PACKAGE) -> str:
    """Digest of all files of ``package`` that the file at ``path`` imports, directly or through others.

    Args:
        path: A Python file in ``package``; its own text is left out, because numba checks it itself.
        package: Folder of the package ``ingle``.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        new = set(_imported_files(waiting.pop(), package)) - found
        found |= new
        waiting += new
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(found - {path}):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def _imported_files(path: Path, package: Path) -> tuple[Path, ...]:
    """Files of ``package`` that one file imports, in whatever block the import stands."""
    modules: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which the key of its kernels does not follow"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)  # the name may be a module
            modules.add(node.module or "")
        else:  # only statements hold imports
            waiting += (child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLD_STATEMENTS))
    own = (module.split(".")[1:] for module in modules if module.split(".")[0] == "ingle")
    candidates = (package.joinpath(*parts[:end]) for parts in own for end in range(len(parts) + 1))
    files = (file for name in candidates for file in (name.with_suffix(".py"), name / "__init__.py"))
    return tuple({file for file in files if file.is_file()})
