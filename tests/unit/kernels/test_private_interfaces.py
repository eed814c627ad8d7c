"""The private interfaces of numba and llvmlite that the kernels rest on.

Neither library documents them or promises to keep them, so ``pyproject.toml`` caps numba's version. A failure here
names what changed and where it is used: adapt that code, then raise the cap.
"""

from __future__ import annotations

import importlib
import inspect

import llvmlite
import numba
import pytest

#: Where a member is, the parameters that are relied on (None for a property), and what for.
INTERFACES = {
    "numba.core.codegen.JITCodeLibrary._finalize_final_module": (["self"], "cache.py overrides it to set linkage"),
    "numba.core.codegen.JITCodeLibrary.enable_object_caching": (["self"], "cache.py calls it"),
    "numba.core.compiler.CompilerBase.define_pipelines": (["self"], "cache.py overrides it"),
    "numba.core.compiler.DefaultPassBuilder.define_nopython_pipeline": (["state"], "cache.py calls it"),
    "numba.core.caching.FunctionCache.load_overload": (["self", "sig", "target_context"], "cache.py overrides it"),
    "numba.core.caching.FunctionCache.save_overload": (["self", "sig", "data"], "cache.py overrides it"),
    "numba.core.caching.FunctionCache._index_key": (["self", "sig", "codegen"], "cache.py overrides it"),
    "numba.core.caching.FunctionCache.cache_path": (None, "cache.py puts its lock file there"),
    "numba.core.cgutils.alloca_once_value": (["builder", "value"], "vector.py emits variables with it"),
    "numba.core.cgutils.for_range": (["builder", "count"], "vector.py emits loops with it"),
    "numba.core.cgutils.get_or_insert_function": (["module", "fnty", "name"], "vector.py calls LLVM's intrinsics"),
    "numba.core.base.BaseContext.make_array": (["self", "typ"], "vector.py finds the memory of arrays"),
    "numba.core.base.BaseContext.get_dummy_value": (["self"], "vector.py returns it"),
    "numba.core.typing.templates._IntrinsicTemplate.generic": (
        ["self", "args", "kws"],
        "vector.py gives it signatures",
    ),
}


@pytest.mark.parametrize("path", INTERFACES)
def test_a_private_interface_is_as_the_kernels_expect(path: str) -> None:
    expected, use = INTERFACES[path]
    module, owner, name = path.rsplit(".", 2)
    try:
        parent = importlib.import_module(f"{module}.{owner}")
    except ModuleNotFoundError:
        parent = getattr(importlib.import_module(module), owner)
    changed = f"numba {numba.__version__} changed {path}. ingle/kernels/numba/{use}."
    assert hasattr(parent, name), changed
    if expected is not None:
        parameters = list(inspect.signature(getattr(parent, name)).parameters)
        assert [p for p in expected if p in parameters] == expected, f"{changed} Its parameters are {parameters}."


def test_a_dispatcher_has_the_attributes_that_the_cache_sets_and_reads() -> None:
    dispatcher = numba.njit(lambda x: x)
    for attribute in ("_cache", "stats.cache_path", "py_func", "overloads", "targetctx"):
        value = dispatcher
        for name in attribute.split("."):
            assert hasattr(value, name), f"numba {numba.__version__} has no Dispatcher.{attribute}; see cache.py."
            value = getattr(value, name)


def test_a_kernel_is_compiled_into_a_library_of_ours_with_internal_functions_only() -> None:
    """What this protects: a resumed run computes the very bits of one that was not stopped."""
    from ingle.kernels.numba import cache

    seen: list[str] = []

    class Probe(cache._SelfContainedCode):
        def _finalize_final_module(self) -> None:
            super()._finalize_final_module()
            seen.extend(f.name for f in self._final_module.functions if f.linkage.name in ("linkonce_odr", "weak_odr"))
            seen.append("finalized")

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(cache, "_SelfContainedCode", Probe)
        kernel = cache.compile_kernel(_increment)
        context.setattr(kernel, "_cache", numba.core.caching.NullCache())
        import numpy as np

        kernel(np.zeros(3))
    sentence = f"numba {numba.__version__}, llvmlite {llvmlite.__version__}: compiling does not pass through cache.py"
    assert seen == ["finalized"], f"{sentence}, or leaves functions that other code can replace: {seen}."


def _increment(values):  # type: ignore[no-untyped-def]
    for i in numba.prange(len(values)):
        values[i] += 1
