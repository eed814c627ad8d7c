"""A weight whose rows have several types, in another order than in the file."""

from __future__ import annotations

import numpy as np
import torch

from ingle.quant import GgufFormats, QuantLinear
from ingle.quant.ggml.joined import JoinedRows


def joined() -> JoinedRows:
    make = GgufFormats()
    first, second = make("q6_k"), make("q4_k")
    assert first is not None and second is not None
    return JoinedRows((first, second), (4, 6), np.random.default_rng(0).permutation(10))


def test_each_part_is_decoded_by_its_own_format() -> None:
    format, weight = joined(), torch.randn(10, 256, generator=torch.Generator().manual_seed(0))
    planes = format.encode(weight)
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == {"data": (4, 210), "data_1": (6, 144)}
    found = format.decode(planes, 10, 256, torch.float32)
    first, second = format.parts
    parts = [
        first.decode({"data": planes["data"]}, 4, 256, torch.float32),
        second.decode({"data": planes["data_1"]}, 6, 256, torch.float32),
    ]
    assert format.order is not None
    assert torch.equal(found[torch.from_numpy(format.order)], torch.cat(parts))
    assert torch.equal(found, format.decode_reference(planes, 10, 256, torch.float32))


def test_a_layer_multiplies_by_the_decoded_weight() -> None:
    layer = QuantLinear(joined(), 256, 10)
    layer.quantize(torch.randn(10, 256, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).sum().backward()
    weight = layer.decode(torch.float32)
    torch.testing.assert_close(layer(x), x @ weight.T)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
