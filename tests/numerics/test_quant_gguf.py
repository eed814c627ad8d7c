"""Compares the decoders of GGUF's formats with the ``gguf`` package; ``tests/contract/test_encoders`` has encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ingle.config import base as sections
from ingle.config.base import base_sections, format_name
from ingle.config.ggml import GgmlBase
from ingle.quant import make_format
from ingle.quant.ggml import GgmlBlocks

gguf = pytest.importorskip("gguf", reason="gguf is the oracle here")

SECTIONS: dict[str, type[GgmlBase]] = {
    format_name(section): section for section in base_sections() if issubclass(section, GgmlBase)
}


def make(name: str) -> tuple[GgmlBlocks, Any]:
    format = make_format(SECTIONS[name](format=name))
    assert isinstance(format, GgmlBlocks)
    return format, getattr(gguf.GGMLQuantizationType, name.upper())


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


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if section.read_only is None])
def test_importance_is_used_or_not(name: str) -> None:
    format, _ = make(name)
    rng = np.random.default_rng(7)
    weight = torch.from_numpy(rng.standard_normal((32, 2 * format.block_size)) * 0.05).float()
    importance = torch.from_numpy(rng.random(weight.shape[1]) ** 4).float()
    plain, weighted = (
        format.decode(format.encode(weight, given), *weight.shape, torch.float32) for given in (None, importance)
    )
    if not format.uses_importance:
        assert torch.equal(plain, weighted)
        return
    errors = [float(((decoded - weight).square() * importance).sum()) for decoded in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]
