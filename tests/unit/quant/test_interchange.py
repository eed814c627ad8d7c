"""Tests damaged layers of other programs: each tensor removed, emptied, reshaped or of another type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant import from_bitnet, from_bitsandbytes, from_hqq, to_bitsandbytes, to_hqq
from ingle.quant.hqq import Hqq
from ingle.quant.int8 import Int8
from ingle.quant.levels import Nf4

Read = Callable[[Mapping[str, Tensor]], Any]


def _layer(kind: str) -> tuple[dict[str, Tensor], Read]:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    if kind == "bitnet":
        tensors = {"weight": torch.zeros(16, 64, dtype=torch.uint8), "weight_scale": torch.tensor([0.5])}
        return tensors, lambda changed: from_bitnet(changed, divides=True)
    if kind == "hqq":
        hqq = Hqq(bits=4, group_size=64)
        return to_hqq(hqq.encode(weight), hqq, 64, 64), from_hqq
    format = {
        "nf4": Nf4(block_size=64, double_quant=False),
        "nf4 double": Nf4(block_size=64, double_quant=True),
        "int8": Int8(),
    }[kind]
    return to_bitsandbytes(format.encode(weight), format, 64, 64), from_bitsandbytes


_CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "removed": lambda tensor: None,
    "empty": lambda tensor: tensor.flatten()[:0],
    "int64": lambda tensor: tensor.to(torch.int64),
    "float32": lambda tensor: tensor.to(torch.float32),
    "nan": lambda tensor: torch.full(tensor.shape, float("nan")),
    "one more": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()[:1]]),
    "three sizes": lambda tensor: tensor.flatten().view(1, -1, 1),
    "negative": lambda tensor: -tensor.to(torch.int32),
    "zero": lambda tensor: torch.zeros_like(tensor),
}


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8", "hqq", "bitnet"])
def test_every_damage_is_harmless_or_refused(kind: str) -> None:
    tensors, read = _layer(kind)
    format, planes = read(tensors)
    specs = format.plane_specs(64, 64)
    refused = 0
    for key in tensors:
        for name, change in _CHANGES.items():
            damaged = {other: tensor for other, tensor in tensors.items() if other != key}
            if (changed := change(tensors[key])) is not None:
                damaged[key] = changed
            try:
                found, others = read(damaged)
            except QuantizationError:
                refused += 1
                continue
            # What is taken has the planes that its format asks for.
            assert found == format, f"{key} {name}"
            for plane, spec in specs.items():
                assert tuple(others[plane].shape) == spec.shape, f"{key} {name}"
                assert others[plane].dtype == planes[plane].dtype, f"{key} {name}"
    assert refused > len(tensors)
