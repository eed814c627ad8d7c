"""Compiles numba kernels and keeps the machine code on disk.

This depends on private interfaces of numba; ``tests/unit/kernels/test_private_interfaces.py`` lists them.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite.binding import Linkage
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder

from ingle.kernels.numba.scalars import FAST

Kernel = Callable[..., Any]

#: Folder of the package ``ingle``.
_PACKAGE = Path(__file__).parents[2]

#: Syntax that may contain a statement.
_HOLD_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


def compile_kernel(function: Kernel, *, name: str | None = None) -> Kernel:
    """Compiles a parallel kernel on its first call with each combination of argument types.

    The machine code is kept in ``__pycache__`` next to the source, or in numba's folder in the user's cache if that is
    not writable. If neither is, every process compiles the kernel.

    Args:
        function: Python function in numba's subset of the language.
        name: Identifies the machine code within the file; a function that makes kernels gives each a name of its own.
    """
    return _compile(function, name)


def compile_float_kernel(function: Kernel) -> Kernel:
    """Like :func:`compile_kernel`; floating-point sums may be reordered."""
    return _compile(function, fastmath=FAST)


def is_compiled(kernel: Kernel) -> bool:
    """Returns whether machine code of a kernel is on disk, for any argument types."""
    dispatcher: Any = kernel
    folder = dispatcher.stats.cache_path  # None where nothing can be kept
    return folder is not None and any(Path(folder).glob(f"*.{dispatcher.py_func.__qualname__}-*.nbi"))


def _compile(function: Kernel, name: str | None = None, **options: Any) -> Kernel:
    options |= {"parallel": True, "nogil": True, "error_model": "numpy", "pipeline_class": _Compiler}
    # Numba only checks the file of the kernel, so the name must depend on code that is inlined from other files.
    function.__qualname__ = f"{name or function.__qualname__}-{source_digest(Path(inspect.getfile(function)))}"
    compiled: Any = njit(**options)(function)
    with suppress(RuntimeError):  # no folder is writable
        compiled._cache = _KernelCache(function)
    kernel: Kernel = compiled
    return kernel


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, with a lock and with a key that does not depend on the process.

    Without the lock, two processes that compile a kernel for different types at once may store both under the same
    number, and a third process would load code for the wrong types. Numba's key pickles the variables of a closure,
    which differ between processes; here, names are unique and contain a digest of all sources.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with self._lock(fcntl.LOCK_SH):
            return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        with self._lock(fcntl.LOCK_EX):
            super().save_overload(sig, data)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self._py_func.__qualname__

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        with ExitStack() as stack:
            with suppress(OSError):  # the folder is gone, or its file system has no locks
                file = stack.enter_context((Path(self.cache_path) / "ingle-kernels.lock").open("ab"))
                fcntl.flock(file, kind)
            yield


class _Compiler(CompilerBase):  # type: ignore[misc]
    """Ensures that the process that compiles a kernel runs exactly the code that it stores on disk."""

    def define_pipelines(self) -> list[Any]:
        code = _SelfContainedCode(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        code.enable_object_caching()
        self.state["library"] = code
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


class _SelfContainedCode(JITCodeLibrary):  # type: ignore[misc]
    """Machine code of a kernel that calls no function that numba compiled outside of it.

    A function that a kernel calls, such as the body of its loop, exists twice in the process that compiles it:
    optimized by itself, and copied into the kernel and optimized again, which may reorder sums. The copy goes to disk,
    but calls by name would use the first one, so a resumed run would end with different bits than one that was not
    stopped. Internal linkage binds calls to the copy.
    """

    def _finalize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage in (Linkage.linkonce_odr, Linkage.weak_odr):
                function.linkage = Linkage.internal
        super()._finalize_final_module()


def source_digest(path: Path, package: Path = _PACKAGE) -> str:
    """Returns the digest of a file of ``package`` and of all files of ``package`` that it imports, even indirectly."""
    found = {path}
    waiting = [path]
    while waiting:
        new = set(_imported_files(waiting.pop(), package)) - found
        found |= new
        waiting += new
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(found):
        name = file.relative_to(package) if file.is_relative_to(package) else file.name
        digest.update(f"{name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def _imported_files(path: Path, package: Path) -> tuple[Path, ...]:
    """Files of ``package`` that a file imports, at any depth of nesting."""
    modules: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which the digest of its kernels does not follow"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)  # the name may be a module
            modules.add(node.module or "")
        else:  # only statements contain imports
            waiting += (child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLD_STATEMENTS))
    own = (module.split(".")[1:] for module in modules if module.split(".")[0] == "ingle")
    # Every import runs the package's own __init__.py, but it leads to all of Ingle and no kernel inlines from it.
    candidates = (package.joinpath(*parts[:end]) for parts in own for end in range(1, len(parts) + 1))
    files = (file for name in candidates for file in (name.with_suffix(".py"), name / "__init__.py"))
    return tuple({file for file in files if file.is_file()})
