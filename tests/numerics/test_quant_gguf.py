"""The ``gguf`` package as the independent oracle of GGUF's formats: same bytes in, same weights out, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.config import base as sections
from ingle.config.base import base_sections, format_name
from ingle.config.ggml import GgmlBase
from ingle.quant import make_format
from ingle.quant.ggml import GgmlBlocks

gguf = pytest.importorskip("gguf", reason="gguf is the oracle here")

SECTIONS: dict[str, type[GgmlBase]] = {
    format_name(section): section for section in base_sections() if issubclass(section, GgmlBase)
}
#: What the package can pack; the rest is compared with ggml itself.
PACKED = [name for name in SECTIONS if name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0")]


def make(name: str) -> tuple[GgmlBlocks, Any]:
    format = make_format(SECTIONS[name](format=name))
    assert isinstance(format, GgmlBlocks)
    return format, getattr(gguf.GGMLQuantizationType, name.upper())


def draw_weight(format: GgmlBlocks, rows: int = 41, blocks: int = 5) -> Tensor:
    """Rows of many sizes, with zeros, constants, outliers and ties."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, blocks * format.block_size, generator=generator)
    weight[1] = 0
    weight[2] = 0.5
    weight[3] = -0.037
    weight[4, ::50] *= 100
    weight[5] = (weight[5] * 200).round() / 64
    weight[6] *= 1e-5
    weight[7] *= 1e-9
    weight[8] = weight[8].abs()
    weight[9] = -weight[9].abs() - 0.01
    weight[10] *= 1e4
    weight[11, : format.block_size // 2] = 0
    weight[12] = weight[12].sign()
    return weight


def test_every_section_has_a_format() -> None:
    assert all(name in sections.FormatName.__args__ for name in SECTIONS)
    for name, section in SECTIONS.items():
        size, num_bytes = gguf.GGML_QUANT_SIZES[make(name)[1]]
        assert (section.block_size, section.block_bytes) == (size, num_bytes)


@pytest.mark.parametrize("name", SECTIONS)
def test_any_bytes_decode_to_their_weights(name: str) -> None:
    format, kind = make(name)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (7, 40 * format.base.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    planes = {"data": torch.from_numpy(data)}
    shape = expected.shape[0], expected.shape[1]
    fine = expected.isfinite()
    assert fine.float().mean() > 0.9
    for decoded in (
        format.decode(planes, *shape, torch.float32),
        format.decode_reference(planes, *shape, torch.float32),
    ):
        assert torch.equal(decoded[fine], expected[fine])
        assert torch.equal(decoded.isnan(), expected.isnan())
    # rounded once; where it stays finite
    rounded = format.decode(planes, *shape, torch.bfloat16)
    assert torch.equal(rounded[fine], expected.bfloat16()[fine])


@pytest.mark.parametrize("name", PACKED)
def test_bytes_are_those_of_the_package(name: str) -> None:
    format, kind = make(name)
    weight = draw_weight(format)
    expected = gguf.quants.quantize(weight.numpy(), kind)
    assert torch.equal(format.encode(weight)["data"], torch.from_numpy(expected))
