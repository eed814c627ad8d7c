"""Compares the fast encoder of every format with an independent one.

====================================== ==================================================================
format                                 independent encoder
====================================== ==================================================================
nf4, fp4, int8, ternary                the format's plain torch (``encode_reference``), bit for bit
GGUF's formats                         ggml, through llama-cpp-python: the same bytes, with and without importance
q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0/2  also the ``gguf`` package: the same bytes
hqq with ``solver: hqq``               the published formula in numpy, up to rounding
hqq with ``solver: ingle``             a slow search in float64: the same weighted square error
====================================== ==================================================================

Where llama-cpp-python is not installed, digests of the bytes that ggml returned replace it; write them with
``python -m tests.contract.test_encoders``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.kernels.hqq.dispatch import STARTS
from ingle.quant import Format, make_format
from ingle.quant.ggml import GgmlBlocks
from ingle.quant.hqq import Hqq, bytes_to_codes
from ingle.quant.plane import as_float16
from tests.contract.test_formats import CONVERTED, DTYPES, FORMATS, SHAPES
from tests.contract.test_formats import draw as draw_gaussian

#: Numbers of the types in ggml.h.
KINDS = {
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13},
    **{"q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34, "tq2_0": 35},
}
IN_PACKAGE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0")
CASES = [(kind, weighting) for kind in ("plain", "heavy") for weighting in ("none", "given", "holes")]
DIGESTS = Path(__file__).with_name("ggml_digests.json")


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


def compare_with_torch(format: Format) -> None:
    for shape in SHAPES:
        weight = draw_gaussian(*shape)
        weight[0] *= 1e-6
        weight[-1] *= 1e4
        weight[2:3] = 0
        weight[4:5] *= torch.tensor([1e-37, 0]).repeat(weight.shape[1])[: weight.shape[1]]
        for dtype in DTYPES if shape in CONVERTED else DTYPES[:2]:
            planes = format.encode(weight.to(dtype))
            codes, scales = format.encode_reference(weight.to(dtype))  # type: ignore[attr-defined]
            assert torch.equal(planes["codes"], codes), (shape, dtype)
            stored = planes["scale" if "scale" in planes else "absmax"]
            if "nested_absmax" not in planes:  # bitsandbytes is the oracle of those
                assert torch.equal(stored.view(scales.dtype).flatten(), scales.flatten()), (shape, dtype)


def compare_with_ggml(format: GgmlBlocks) -> None:
    columns = 5 * format.block_size
    assert digest(format, None) == json.loads(DIGESTS.read_text())[format.name]
    library = load_ggml()
    for kind, weighting in CASES:
        weight, importance = draw(columns, kind), draw_importance(columns, weighting)
        ours = format.encode(weight, importance)["data"]
        if library is not None:
            assert torch.equal(ours, encode_by_ggml(library, format, weight, importance)), (kind, weighting)
        if importance is None and kind == "plain" and format.name in IN_PACKAGE:
            theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[format.name.upper()])
            assert torch.equal(ours, torch.from_numpy(theirs))


@cache
def load_ggml() -> Any:
    """ggml's library: INGLE_GGML names it, or llama-cpp-python contains it, whose import would load all of it."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin is not None else Path("/")
    path = os.environ.get("INGLE_GGML") or next(folder.glob("libggml-base.*"), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]
    return library


def encode_by_ggml(library: Any, format: GgmlBlocks, weight: Tensor, importance: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    data = torch.zeros(rows, columns // format.block_size * format.base.block_bytes, dtype=torch.uint8)
    given = None if importance is None else importance.data_ptr()
    kind = KINDS[format.name]
    written = library.ggml_quantize_chunk(kind, weight.data_ptr(), data.data_ptr(), 0, rows, columns, given)
    assert written == data.numel()
    return data


def digest(format: GgmlBlocks, library: Any) -> str:
    """SHA-256 of the bytes of all cases, encoded by ggml or by us."""
    total, columns = hashlib.sha256(), 5 * format.block_size
    for case in CASES:
        weight, importance = draw(columns, case[0]), draw_importance(columns, case[1])
        if library is None:
            total.update(format.encode(weight, importance)["data"].numpy().tobytes())
        else:
            total.update(encode_by_ggml(library, format, weight, importance).numpy().tobytes())
    return total.hexdigest()


def follow_paper(row: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The published solver on a matrix of one row, as its formula is written, in float32."""
    top = np.float32(2**bits - 1)
    w = row.reshape(-1, size).astype(np.float32)
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    s = np.minimum(top / (high - low), np.float32(2e4))
    z = -low * s
    if bits == 4:
        z = np.round(z)
    beta, best = 10.0, np.inf
    for _ in range(20):
        q = np.clip(np.round(w * s + z), 0, top)
        error = w - (q - z) / s
        size_ = np.maximum(np.abs(error), np.float32(1e-30))  # 0 ** -0.3 times zero is not a number
        shrunk = np.sign(error) * np.maximum(np.abs(error) - size_ ** np.float32(-0.3) / np.float32(beta), 0)
        z = (q - (w - shrunk) * s).mean(1, keepdims=True)
        beta *= 1.01
        if np.abs(error).mean() >= best:
            break
        best = np.abs(error).mean()
    q = np.clip(np.round(w * s + z), 0, top)
    return q.reshape(-1), (1 / s).reshape(-1), z.reshape(-1)


def compare_with_paper(format: Hqq) -> None:
    weight = torch.from_numpy(0.02 * np.random.default_rng(3).standard_t(3, (24, 1024))).float()
    planes = format.encode(weight)
    expected = [follow_paper(row, format.bits, format.group_size) for row in weight.numpy()]
    codes, scale, zero = (torch.from_numpy(np.stack(part)) for part in zip(*expected, strict=True))
    ours = bytes_to_codes(planes["codes"], format.bits, weight.shape[1])
    assert (ours == codes).double().mean() > 0.9995  # sums in another order change a code now and then
    assert torch.allclose(as_float16(planes["scale"]), scale.half(), rtol=2**-10)  # numpy and torch divide differently
    assert torch.allclose(as_float16(planes["zero"]).float(), zero, rtol=1e-3, atol=2e-3)


def search(groups: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Weighted square errors of groups on their best grid, by regression from every start, without any rounding."""
    top, (first, last, num_starts) = 2**bits - 1, STARTS[bits]
    low, high = groups.aminmax(dim=1, keepdim=True)
    least = torch.full((len(groups), 1), torch.inf, dtype=torch.float64)
    grid = torch.zeros(2, len(groups), 1, dtype=torch.float64)

    def attempt(scale: Tensor, offset: Tensor) -> None:
        """Assigns codes on a grid ``code * scale + offset``, fits the grid to them and keeps it if it is better."""
        codes = ((groups - offset) / scale).round().clamp(0, top)
        total = weights.sum(1, keepdim=True)
        mean, centre = ((weights * values).sum(1, keepdim=True) / total for values in (groups, codes))
        slope = (weights * (codes - centre) * (groups - mean)).sum(1, keepdim=True)
        slope = slope / (weights * (codes - centre).square()).sum(1, keepdim=True)
        error = (weights * ((codes - centre) * slope + mean - groups).square()).sum(1, keepdim=True)
        better = error < least
        least[better] = error[better]
        grid[:, better] = torch.stack((slope, mean - slope * centre))[:, better]

    shares = [first + (last - first) / (num_starts - 1) * index for index in range(num_starts)]
    for below, above in product(shares, shares):
        start = low + below * (high - low)
        attempt((high - above * (high - low) - start) / top, start)
    for _ in range(3):
        attempt(*grid.clone())
    return least


def compare_with_slow_search(format: Hqq) -> None:
    rng = np.random.default_rng(8)
    for kind, importance in product(("plain", "heavy"), (None, torch.from_numpy(rng.random(640) + 0.01).float())):
        weight = draw(640, kind)[15:]
        planes = format.encode(weight, importance)
        decoded = format.decode_reference(planes, *weight.shape, torch.float64)
        weights = (torch.ones(640) if importance is None else importance).double().expand_as(weight)
        groups = weight.double().reshape(-1, format.group_size)
        expected = search(groups, weights.reshape(-1, format.group_size), format.bits).sum()
        found = (weights * (decoded - weight).square()).sum()
        assert 0.99 * expected < found < 1.02 * expected, (kind, importance is None, float(found / expected))


@pytest.mark.parametrize("key", FORMATS)
def test_the_fast_encoder_agrees_with_an_independent_one(key: str) -> None:
    match make_format(FORMATS[key]):
        case GgmlBlocks() as format:
            compare_with_ggml(format)
        case Hqq(solver="hqq") as format:
            compare_with_paper(format)
        case Hqq() as format:
            compare_with_slow_search(format)
        case Format() as format:
            compare_with_torch(format)


if __name__ == "__main__":
    formats = [make_format(FORMATS[name]) for name in KINDS]
    assert load_ggml() is not None, "ggml is needed to write its digests"
    found = {format.name: digest(format, load_ggml()) for format in formats if isinstance(format, GgmlBlocks)}
    DIGESTS.write_text(json.dumps(found, indent=2) + "\n")
