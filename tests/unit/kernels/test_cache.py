"""What a compiled kernel is kept by."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import prange

from ingle.kernels.layers import elementwise
from ingle.kernels.numba import cache

#: Every way to import a module that the key has to follow, and the file that it leads to.
IMPORTS = {
    "from ingle.near import (\n    f,\n)": "near.py",
    "from ingle import near": "near.py",
    "import ingle.folder.near as other": "folder/near.py",
    "from ingle.folder import f": "folder/__init__.py",
    "def late():\n    if True:\n        from ingle.folder.near import f": "folder/near.py",
}


@pytest.mark.parametrize("statement", IMPORTS)
def test_the_key_follows_every_import(tmp_path: Path, statement: str) -> None:
    changed = tmp_path / IMPORTS[statement]
    text = {tmp_path / "kernel.py": f"import numpy\n{statement}\n", tmp_path / "unrelated.py": ""}
    text |= {tmp_path / "folder/__init__.py": "", changed: "from ingle.far import g\n"}
    text[tmp_path / "far.py"] = "from ingle import kernel\n"  # a circle ends
    (tmp_path / "folder").mkdir()
    for file, content in text.items():
        file.write_text(content)
    before = key(tmp_path / "kernel.py", tmp_path)
    for file, matters in (("unrelated.py", False), ("kernel.py", False), (changed, True), ("far.py", True)):
        (tmp_path / file).write_text((tmp_path / file).read_text() + "# changed\n")
        assert (key(tmp_path / "kernel.py", tmp_path) != before) == matters, file


def key(path: Path, package: Path) -> str:
    cache._imported_files.cache_clear()
    return cache.imports_digest(path, package)


def test_the_keys_of_real_kernels_name_every_file_they_inline(tmp_path: Path) -> None:
    """What importing a kernel's module alone brings into a process is what its key has to follow."""
    script = "import sys, ingle.kernels.ggml.encoders as _; print(*(module.__file__ for module in sys.modules.values()"
    script += " if module.__name__.startswith('ingle.')))"
    loaded = {Path(file) for file in subprocess.check_output([sys.executable, "-c", script], text=True).split()}
    package = Path(cache.__file__).parents[2]
    copy = shutil.copytree(package, tmp_path / "ingle", ignore=shutil.ignore_patterns("__pycache__"))
    kernel = copy / "kernels/ggml/encoders.py"
    before = key(kernel, copy)
    inlined = [file.relative_to(package) for file in loaded if "kernels" in file.parts and file.name != "encoders.py"]
    assert len(inlined) > 8
    for file in inlined:
        text = (copy / file).read_text()
        (copy / file).write_text(text + "# changed\n")
        assert key(kernel, copy) != before, file
        (copy / file).write_text(text)


def test_the_name_of_a_kernel_in_the_cache_holds_its_key() -> None:
    name = elementwise._rms_norm.py_func.__qualname__
    assert name == f"_rms_norm-{cache.imports_digest(Path(elementwise.__file__))}"


@cache.compile_float_kernel
def _double(values):  # type: ignore[no-untyped-def]
    for i in prange(len(values)):
        values[i] *= 2


@cache.compile_float_kernel
def _never_called(values):  # type: ignore[no-untyped-def]
    for i in prange(len(values)):
        values[i] *= 3


def test_a_kernel_computes_and_is_kept() -> None:
    values = np.arange(3.0)
    _double(values)
    assert values.tolist() == [0.0, 2.0, 4.0]
    assert cache.is_compiled(_double)
    assert not cache.is_compiled(_never_called)


_COMPUTE = """
import hashlib
import numpy as np
from ingle.kernels.attention.softmax import differentiate, exponentiate

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
