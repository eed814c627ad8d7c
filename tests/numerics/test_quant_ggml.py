"""ggml itself as the oracle of packing: byte for byte, with and without an importance matrix.

The library is the one inside the llama-cpp-python package; where that is not installed, digests of what it answered
stand in for it (``python -m tests.numerics.test_quant_ggml`` writes them anew).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.config.base import base_sections, format_name
from ingle.config.ggml import GgmlBase
from ingle.quant import make_format
from ingle.quant.ggml import GgmlBlocks

SECTIONS: dict[str, type[GgmlBase]] = {
    format_name(section): section
    for section in base_sections()
    if issubclass(section, GgmlBase) and section.read_only is None
}
#: Numbers of the types in ggml.h.
KINDS = {
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13},
    **{"q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34, "tq2_0": 35},
}
DIGESTS = Path(__file__).with_name("ggml_digests.json")


def find_library() -> Path | None:
    """Where ggml's library is: INGLE_GGML names it, or llama-cpp-python brings it; importing that would load all."""
    if "INGLE_GGML" in os.environ:
        return Path(os.environ["INGLE_GGML"])
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "lib").glob("libggml-base.*"), None)


@pytest.fixture(scope="module")
def ggml() -> Any:
    path = find_library()
    if path is None:
        pytest.skip("llama-cpp-python is not installed here: ggml's digests stand in for ggml")
    return load_library(path)


def load_library(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]
    return library


def pack(library: Any, name: str, weight: Tensor, importance: Tensor | None) -> Tensor:
    """What ggml makes of a weight."""
    section = SECTIONS[name]
    rows, columns = weight.shape
    data = torch.zeros(rows, columns // section.block_size * section.block_bytes, dtype=torch.uint8)
    given = None if importance is None else importance.data_ptr()
    written = library.ggml_quantize_chunk(KINDS[name], weight.data_ptr(), data.data_ptr(), 0, rows, columns, given)
    assert written == data.numel()
    return data


def make(name: str) -> GgmlBlocks:
    format = make_format(SECTIONS[name](format=name))
    assert isinstance(format, GgmlBlocks)
    return format


def draw(columns: int, kind: str) -> Tensor:
    """Rows of many sizes and shapes, the same on every machine: numpy's bits are, its transcendentals may not be."""
    rng = np.random.default_rng(7)
    weight = (rng.random((47, columns)) + rng.random((47, columns)) + rng.random((47, columns)) - 1.5) * 0.05
    if kind == "heavy":
        weight = weight / (0.05 + rng.random((47, columns)))
    weight[1] = 0
    weight[2] = 0.5
    weight[3] = -0.037
    weight[4, ::50] *= 100
    weight[5] = np.round(weight[5] * 200) / 64
    weight[6] *= 1e-5
    weight[7] *= 1e-9
    weight[8] = np.abs(weight[8])
    weight[9] = -np.abs(weight[9]) - 0.01
    weight[10] *= 1e4
    weight[11, : columns // 3] = 0
    weight[12] = np.sign(weight[12])
    weight[13, ::2] = 0
    weight[14] *= 1e-13
    return torch.from_numpy(weight.astype(np.float32))


def draw_importance(columns: int, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    importance = np.random.default_rng(8).random(columns) ** 4
    importance[:7] = 0
    if kind == "holes":
        importance[32:300] = 0
    return torch.from_numpy(importance.astype(np.float32))


CASES = [(kind, weighing) for kind in ("plain", "heavy") for weighing in ("none", "given", "holes")]


@pytest.mark.parametrize(("kind", "weighing"), CASES)
@pytest.mark.parametrize("name", SECTIONS)
def test_bytes_are_those_of_ggml(name: str, kind: str, weighing: str, ggml: Any) -> None:
    format = make(name)
    columns = 5 * format.block_size
    weight, importance = draw(columns, kind), draw_importance(columns, weighing)
    ours = format.encode(weight, importance)["data"]
    assert torch.equal(ours, pack(ggml, name, weight, importance))


@pytest.mark.parametrize("name", SECTIONS)
def test_bytes_have_the_digests_that_ggml_gave(name: str) -> None:
    assert digest(name, None) == json.loads(DIGESTS.read_text())[name]


@pytest.mark.parametrize("name", SECTIONS)
def test_importance_is_used_or_not(name: str) -> None:
    format = make(name)
    weight, columns = draw(2 * format.block_size, "plain")[15:], 2 * format.block_size
    importance = draw_importance(columns, "given")
    assert importance is not None
    plain, weighed = (format.decode(format.encode(weight, i), *weight.shape, torch.float32) for i in (None, importance))  # type: ignore[call-arg]
    if not format.uses_importance:
        assert torch.equal(plain, weighed)
        return
    errors = [float(((decoded - weight).square() * importance).sum()) for decoded in (plain, weighed)]
    assert errors[1] < 0.95 * errors[0]


def digest(name: str, library: Any) -> str:
    """SHA-256 over the bytes of all cases, by ggml or by us."""
    total = hashlib.sha256()
    format = make(name)
    columns = 5 * format.block_size
    for kind, weighing in CASES:
        weight, importance = draw(columns, kind), draw_importance(columns, weighing)
        packed = (
            format.encode(weight, importance)["data"] if library is None else pack(library, name, weight, importance)
        )
        total.update(packed.numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    path = find_library()
    assert path is not None, "ggml is needed to write its digests"
    DIGESTS.write_text(json.dumps({name: digest(name, load_library(path)) for name in SECTIONS}, indent=2) + "\n")
