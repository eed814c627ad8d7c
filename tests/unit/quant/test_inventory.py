"""Tests the audit of a model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ingle.config.base import BaseConfig, Int8Base, Nf4Base
from ingle.quant import audit, convert


def make_model() -> nn.Module:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(16, 64),
            "up": nn.Linear(64, 128),
            "down": nn.Linear(128, 64, bias=False),
            "norm": nn.BatchNorm1d(64),
        }
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model["norm"].weight.requires_grad_(True)
    return model


def test_a_plain_model() -> None:
    report = audit(make_model())
    assert report.quantized == 0
    assert report.unquantized == ()
    assert report.parameters == 16 * 64 + 64 * 128 + 128 + 128 * 64 + 64 + 64
    assert report.trainable == 64
    buffers = 2 * 64 * 4 + 8
    assert report.bytes == 4 * report.parameters + buffers
    assert report.bytes_by_dtype == {"float32": 4 * report.parameters + 2 * 64 * 4, "int64": 8}


@pytest.mark.parametrize(
    ("base", "bits"),
    [
        (Nf4Base(format="nf4", double_quant=False), 4.5),
        (Nf4Base(format="nf4", block_size=32, double_quant=False), 5.0),
        (Int8Base(format="int8"), 8 + 32 / 64),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantized_weights_count_as_weights(base: BaseConfig, bits: float, device: str) -> None:
    model = make_model().to(device)
    plain = audit(model)
    convert(model, base)
    report = audit(model)
    assert report.parameters == plain.parameters
    assert report.quantized == 2 * 64 * 128
    rows = {row.class_name: row for row in report.classes}
    quantized = rows["QuantLinear"]
    assert (quantized.modules, quantized.format) == (2, base.format)
    assert (quantized.parameters, quantized.quantized, quantized.trainable) == (2 * 64 * 128 + 128, 2 * 64 * 128, 0)
    scales = 4 * 128 - 4 * 64 if base.format == "int8" else 0  # one scale a row: the two layers differ
    expected = 64 * 128 * (8 + 32 / 64) / 8 + 64 * 128 + 4 * 64 if scales else 2 * 64 * 128 * bits / 8
    assert quantized.bytes == expected + 4 * 128
    assert [left.name for left in report.unquantized] == ["embed"]
    assert report.unquantized[0].frozen
    assert sum(report.bytes_by_dtype.values()) == report.bytes == sum(row.bytes for row in report.classes)


def test_shared_tensors_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)})
    model["head"].weight = model["embed"].weight
    report = audit(model)
    assert report.parameters == 16 * 8
    assert [row.class_name for row in report.classes] == ["Embedding"]


def test_it_is_plain_data() -> None:
    model = make_model()
    convert(model, Nf4Base(format="nf4"))
    plain = json.loads(json.dumps(audit(model).to_dict()))
    assert plain["quantized"] == 2 * 64 * 128
    assert plain["classes"][0]["class_name"] in {"QuantLinear", "Embedding"}
    assert plain["unquantized"][0]["name"] == "embed"
    assert torch.get_default_dtype() == torch.float32
