"""Tests the layout of the ``hqq`` package: stripes by their definition, round trips, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant import from_hqq, to_hqq
from ingle.quant.hqq import Hqq, bytes_to_codes
from ingle.quant.interchange.hqq import codes_to_stripes, stripes_to_codes
from ingle.quant.plane import as_float16

BITS = (8, 4, 3, 2, 1)
#: Codes to a number and the lowest bit of the first of them, for each number of bits.
LAYOUT = {8: (1, 0), 4: (2, 4), 3: (10, 27), 2: (4, 6), 1: (8, 7)}
SHAPE = (16, 192)


def make_layer(bits: int, size: int = 64) -> tuple[Hqq, dict[str, Tensor]]:
    format = Hqq(bits, size)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(bits))
    return format, format.encode(weight)


@pytest.mark.parametrize("num_groups", [80, 48])
@pytest.mark.parametrize("bits", BITS)
def test_stripes_are_those_of_the_package(bits: int, num_groups: int) -> None:
    count, first = LAYOUT[bits]
    codes = torch.randint(2**bits, (num_groups, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stripes = codes_to_stripes(codes, bits)
    rows = -(-num_groups // count)
    assert stripes.shape == (rows, 8)
    assert stripes.dtype == (torch.int32 if bits == 3 else torch.uint8)
    for group in range(num_groups):
        stripe, row = divmod(group, rows)
        assert torch.equal(stripes[row] >> (first - stripe * bits) & (2**bits - 1), codes[group])
    assert torch.equal(stripes_to_codes(stripes, bits)[:num_groups], codes)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("bits", BITS)
def test_there_and_back_through_a_file(tmp_path: Path, bits: int, size: int) -> None:
    format, planes = make_layer(bits, size)
    file = tmp_path / "layer.safetensors"
    save_file(to_hqq(planes, format, *SHAPE), file)
    read = load_file(file)
    assert read["scale"].shape == read["zero"].shape == (16 * 192 // size, 1)
    assert read["scale"].dtype == torch.float16
    assert bytes(read["compute_dtype"].tolist()) == b"torch.float16"
    same, back = from_hqq(read)
    assert same == format
    assert all(torch.equal(back[name], plane) for name, plane in planes.items())
    codes = stripes_to_codes(read["W_q"], bits)[: len(read["scale"])].double()
    weight = ((codes - read["zero"].double()) * read["scale"].double()).reshape(SHAPE)  # as the package decodes
    assert torch.allclose(format.decode(planes, *SHAPE, torch.float64), weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("view", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_viewed_as_floats_are_read(view: torch.dtype) -> None:
    format, planes = make_layer(4)
    tensors = to_hqq(planes, format, *SHAPE)
    _, back = from_hqq(tensors | {"W_q": tensors["W_q"].view(view)})
    assert torch.equal(back["codes"], planes["codes"])


def test_scales_of_other_dtypes_are_read_where_float16_holds_them() -> None:
    format, planes = make_layer(4)
    tensors = to_hqq(planes, format, *SHAPE)
    _, back = from_hqq(tensors | {name: tensors[name].float() for name in ("scale", "zero")})
    assert torch.equal(back["scale"], planes["scale"])
    brain = {name: tensors[name].bfloat16() for name in ("scale", "zero")}
    _, back = from_hqq(tensors | brain)
    assert torch.equal(as_float16(back["zero"]).flatten(), brain["zero"].half().flatten())
    with pytest.raises(QuantizationError, match="float16 cannot represent") as caught:
        from_hqq(tensors | {"zero": tensors["zero"].float() * (1 + 1e-6)}, name="model.layers.0.q_proj")
    assert "model.layers.0.q_proj.zero" in str(caught.value)
    with pytest.raises(QuantizationError, match="float16 cannot represent"):
        from_hqq(tensors | {"scale": torch.full_like(tensors["scale"], torch.nan)})


def test_what_is_held_otherwise_is_refused() -> None:
    format, planes = make_layer(4)
    tensors = to_hqq(planes, format, *SHAPE)
    for key, value in (("axis", 0), ("nbits", 1.58), ("nbits", 5), ("group_size", 256), ("group_size", 24)):
        with pytest.raises(QuantizationError, match="unsupported variant"):
            from_hqq(tensors | {key: torch.tensor(value)})
    with pytest.raises(QuantizationError, match="does not match its 4 bits"):
        from_hqq(tensors | {"packing": torch.tensor(list(b"2bit_u8"), dtype=torch.uint8)})
    with pytest.raises(QuantizationError, match="size of the codes"):
        from_hqq(tensors | {"W_q": tensors["W_q"][1:]})
    with pytest.raises(QuantizationError, match="does not match the shape"):
        from_hqq(tensors | {"scale": tensors["scale"][1:]})
    with pytest.raises(QuantizationError, match="not a multiple of group_size"):
        from_hqq(tensors | {"shape": torch.tensor([32, 96])})
    del tensors["zero"]
    with pytest.raises(QuantizationError, match="not an HQQ layer") as caught:
        from_hqq(tensors, name="lm")
    assert "missing: zero" in str(caught.value)


def test_what_the_package_cannot_hold_is_refused() -> None:
    format = Hqq(4, 64)
    with pytest.raises(QuantizationError, match="not a multiple of group_size"):
        to_hqq(format.encode(torch.randn(4, 100)), format, 4, 100)
    with pytest.raises(QuantizationError, match="in multiples of 2"):
        to_hqq(format.encode(torch.randn(3, 64)), format, 3, 64)


def test_three_bits_fill_up_to_tens() -> None:
    format = Hqq(3, 64)
    planes = format.encode(torch.randn(3, 64))
    tensors = to_hqq(planes, format, 3, 64)
    assert tensors["W_q"].shape == (1, 64)
    _, back = from_hqq(tensors)
    assert torch.equal(bytes_to_codes(back["codes"], 3, 64), bytes_to_codes(planes["codes"], 3, 64))
