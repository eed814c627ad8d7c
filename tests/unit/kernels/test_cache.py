"""Machine code of kernels on disk: its key, who may share it, and that it computes what it did when it was compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numba
import numpy as np
import pytest
from numba import prange
from numba.core.caching import IndexDataCacheFile

from ingle.kernels.ggml import decoders
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
    for file, matters in (("unrelated.py", False), ("kernel.py", True), (changed, True), ("far.py", True)):
        original = (tmp_path / file).read_text()
        (tmp_path / file).write_text(original + "# changed\n")
        assert (key(tmp_path / "kernel.py", tmp_path) != before) == matters, file
        (tmp_path / file).write_text(original)


def key(path: Path, package: Path) -> str:
    cache._imported_files.cache_clear()
    return cache.source_digest(path, package)


def test_the_keys_of_real_kernels_follow_every_file_they_inline(tmp_path: Path) -> None:
    """The key has to follow all files that importing a kernel's module loads."""
    script = "import sys, ingle.kernels.ggml.encoders as _; print(*(module.__file__ for module in sys.modules.values()"
    script += " if module.__name__.startswith('ingle.')))"
    loaded = {Path(file) for file in subprocess.check_output([sys.executable, "-c", script], text=True).split()}
    package = Path(cache.__file__).parents[2]
    copy = shutil.copytree(package, tmp_path / "ingle", ignore=shutil.ignore_patterns("__pycache__"))
    kernel = copy / "kernels/ggml/encoders.py"
    before = key(kernel, copy)
    inlined = [file.relative_to(package) for file in loaded if "kernels" in file.parts]
    assert len(inlined) > 8
    for file in inlined:
        text = (copy / file).read_text()
        (copy / file).write_text(text + "# changed\n")
        assert key(kernel, copy) != before, file
        (copy / file).write_text(text)


def test_the_keys_of_real_kernels_do_not_change_with_the_rest_of_the_package(tmp_path: Path) -> None:
    """A change outside of the kernels must not make every machine compile them again."""
    package = Path(cache.__file__).parents[2]
    copy = shutil.copytree(package, tmp_path / "ingle", ignore=shutil.ignore_patterns("__pycache__"))
    kernels = [copy / "kernels/ggml/encoders.py", copy / "kernels/layers/logits.py", copy / "kernels/attention/cpu.py"]
    before = [key(kernel, copy) for kernel in kernels]
    for file in ("__init__.py", "flow.py", "data/__init__.py", "quant/format.py"):
        (copy / file).write_text((copy / file).read_text() + "# changed\n")
    assert [key(kernel, copy) for kernel in kernels] == before


def test_the_name_of_a_kernel_in_the_cache_holds_its_key() -> None:
    name = elementwise._swiglu.py_func.__qualname__
    assert name == f"_swiglu-{cache.source_digest(Path(elementwise.__file__))}"
    names = {kernel.py_func.__qualname__ for kernel in decoders.KERNELS.values()}
    assert names == {f"decode_{name}-{cache.source_digest(Path(decoders.__file__))}" for name in decoders.KERNELS}


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


def test_a_kernel_computes_where_no_folder_is_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(cache, "_KernelCache", refuse)

    def triple(values: Any) -> None:
        for i in prange(len(values)):
            values[i] *= 3

    kernel = cache.compile_kernel(triple)
    values = np.arange(3.0)
    kernel(values)
    assert values.tolist() == [0.0, 3.0, 6.0]
    assert not cache.is_compiled(kernel)


def test_two_processes_that_save_at_once_take_different_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads take turns at the lock as processes do: each save opens the lock file."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    kernel: Any = cache.compile_kernel(_scale)
    for dtype in (np.float32, np.float64):
        kernel(np.ones(3, dtype))
    for file in tmp_path.rglob("*.nb?"):
        file.unlink()
    load_index = IndexDataCacheFile._load_index

    def load_slowly(self: Any) -> Any:
        index = load_index(self)
        time.sleep(0.2)  # the other thread reads the same index, unless it waits
        return index

    monkeypatch.setattr(IndexDataCacheFile, "_load_index", load_slowly)
    saves = [(cache._KernelCache(kernel.py_func), result) for result in kernel.overloads.values()]
    threads = [Thread(target=store.save_overload, args=(result.signature, result)) for store, result in saves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert len(list(tmp_path.rglob("*.nbc"))) == len(saves) == 2
    for store, result in saves:
        assert store.load_overload(result.signature, kernel.targetctx).signature == result.signature


def _scale(values):  # type: ignore[no-untyped-def]
    for i in prange(len(values)):
        values[i] *= 5


_MADE = """
import torch
from ingle.kernels.ggml import decoders, encoders
from ingle.kernels.ggml.dispatch import decode_blocks, encode_blocks

weight, data, out = torch.linspace(-1, 1, 64).view(1, 64), torch.empty(1, 36, dtype=torch.uint8), torch.empty(1, 64)
encode_blocks("q4_0", weight, None, data)
decode_blocks("q4_0", data, out)
kernels = encoders.KERNELS["q4_0"], decoders.KERNELS["q4_0"]
print(*(sum(kernel.stats.cache_hits.values()) for kernel in kernels), float((out - weight).abs().max()))
"""


def test_a_kernel_that_a_function_makes_is_loaded_by_another_process(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _MADE]
    first, second = (subprocess.check_output(command, env=environment, text=True).split() for _ in range(2))
    assert (first[:2], second[:2]) == (["0", "0"], ["1", "1"])
    assert first[2] == second[2] and float(first[2]) < 0.1


_COMPUTE = """
import hashlib
import numpy as np
from ingle.kernels.attention.cpu import differentiate, exponentiate

random = np.random.default_rng(0)
scores, slopes = random.normal(size=(2, 2, 30, 203)).astype(np.float32)
rest, scale, softcap = scores[:, :0][:0], np.float32(0.3), np.float32(0.0)
first, last = np.zeros(15, np.int32), np.arange(188, 203, dtype=np.int32)
bias = np.empty((1, 0), np.float32), 0
weights, lse, delta = scores.copy(), np.empty((2, 30), np.float32), np.full((2, 30), 0.01, np.float32)
exponentiate(weights, rest, first, last, scale, softcap, *bias, lse)
differentiate(scores, rest, slopes, first, last, scale, softcap, *bias, lse, delta)
print(*(hashlib.sha256(array.tobytes()).hexdigest() for array in (weights, lse, scores, slopes)))
"""


def test_a_kernel_just_compiled_computes_what_the_kept_one_does(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPUTE]
    compiled, kept = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert len(list(tmp_path.rglob("*.nbi"))) == 2
    assert kept == compiled
