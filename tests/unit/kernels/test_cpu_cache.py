"""What a compiled kernel is kept by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numba import prange

from ingle.kernels import cpu_cache, elementwise


def test_a_kernel_is_compiled_anew_when_what_it_inlines_changes(tmp_path: Path) -> None:
    kernel, near, far, other = (tmp_path / f"{name}.py" for name in ("kernel", "near", "far", "other"))
    kernel.write_text("import numpy\nfrom ingle.kernels.near import (\n    f,\n)\n")
    near.write_text("from ingle.kernels.far import g\n")
    far.write_text("from ingle.kernels.near import f\n")  # a circle ends
    other.write_text("")
    before = cpu_cache._digest(kernel, tmp_path)
    other.write_text("unrelated")
    kernel.write_text(kernel.read_text() + "# numba sees this by itself\n")
    assert cpu_cache._digest(kernel, tmp_path) == before
    far.write_text(far.read_text() + "# changed\n")
    assert cpu_cache._digest(kernel, tmp_path) != before


def test_the_name_that_a_kernel_is_kept_by_holds_what_it_inlines() -> None:
    name = elementwise._rms_norm.py_func.__qualname__
    assert name == f"_rms_norm-{cpu_cache._digest(Path(elementwise.__file__))}"


@cpu_cache.compile_float_kernel
def _double(values):  # type: ignore[no-untyped-def]
    for i in prange(len(values)):
        values[i] *= 2


@cpu_cache.compile_float_kernel
def _never_called(values):  # type: ignore[no-untyped-def]
    for i in prange(len(values)):
        values[i] *= 3


def test_a_kernel_computes_and_is_kept() -> None:
    values = np.arange(3.0)
    _double(values)
    assert values.tolist() == [0.0, 2.0, 4.0]
    assert cpu_cache.is_compiled(_double)
    assert not cpu_cache.is_compiled(_never_called)


_COMPUTE = """
import hashlib
import numpy as np
from ingle.kernels.attention_softmax import differentiate, exponentiate

random = np.random.default_rng(0)
scores, slopes = random.normal(size=(2, 2, 30, 203)).astype(np.float32)
rest, scale, softcap = scores[:, :0][:0], np.float32(0.3), np.float32(0.0)
first, last = np.zeros(15, np.int32), np.arange(188, 203, dtype=np.int32)
weights, lse, delta = scores.copy(), np.empty((2, 30), np.float32), np.full((2, 30), 0.01, np.float32)
exponentiate(weights, rest, first, last, scale, softcap, lse)
differentiate(scores, rest, slopes, first, last, scale, softcap, lse, delta)
print(*(hashlib.sha256(array.tobytes()).hexdigest() for array in (weights, lse, scores, slopes)))
"""


def test_a_kernel_just_compiled_computes_what_the_kept_one_does(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPUTE]
    compiled, kept = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert len(list(tmp_path.rglob("*.nbi"))) == 2
    assert kept == compiled
