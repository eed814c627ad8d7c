"""Compares BitNet layers with transformers: from the same bytes to the same weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant import from_bitnet
from ingle.quant.ternary import Ternary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecations, in what its compiler imports
    from transformers.integrations import bitnet

SHAPES = [(4, 64), (48, 200), (352, 1024)]


def draw(shape: tuple[int, int]) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_their_bytes_decode_to_their_weights(shape: tuple[int, int], divides: bool) -> None:
    codes = draw(shape)
    scale = torch.tensor([32.0 if divides else 1.21875], dtype=torch.bfloat16)
    quantized = bitnet.pack_weights(codes.clone())
    format, planes = from_bitnet({"weight": quantized, "weight_scale": scale}, divides=divides)
    assert format == Ternary()
    assert {name: (tuple(p.shape), p.dtype) for name, p in planes.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in format.plane_specs(*shape).items()
    }
    expected = codes / scale.float() if divides else codes * scale.float()
    assert torch.equal(format.decode(planes, *shape, torch.float32), expected)


def test_the_layers_answer_as_theirs_do_before_rounding_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity instead of its rounding of inputs, transformers shows whether the scale divides."""
    codes, x = draw((48, 64)), torch.randn(3, 64)
    theirs = bitnet.AutoBitLinear(64, 48, bias=False)
    theirs.weight.data, theirs.weight_scale.data = codes.clone(), torch.tensor([0.75])
    monkeypatch.setattr(bitnet.ActQuant, "apply", lambda x: x)
    planes = {"weight": bitnet.pack_weights(codes.clone()), "weight_scale": torch.tensor([0.75])}
    format, ours = from_bitnet(planes, divides=False)
    torch.testing.assert_close(x @ format.decode(ours, 48, 64, torch.float32).T, theirs(x))


def test_what_makes_no_sense_is_refused() -> None:
    quantized = bitnet.pack_weights(draw((8, 16)))
    one = torch.ones(1)
    with pytest.raises(QuantizationError, match="not ternary"):
        from_bitnet({"weight": quantized | 3, "weight_scale": one}, divides=True)
    with pytest.raises(QuantizationError, match="not a BitNet layer"):
        from_bitnet({"weight": quantized.float(), "weight_scale": one}, divides=True)
    for bad in (torch.zeros(1), one * torch.nan, one * 1e-30):
        with pytest.raises(QuantizationError, match="scale"):
            from_bitnet({"weight": quantized, "weight_scale": bad}, divides=True)
