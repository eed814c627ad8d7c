"""Checkpoints in the ``hqq`` package's layout: its codes and scales are taken as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ingle import models
from ingle.config import BaseConfig, ModelConfig, NoBase
from ingle.config.base import HqqBase
from ingle.errors import ModelError
from ingle.quant import to_hqq
from ingle.quant.hqq import Hqq, bytes_to_codes
from ingle.quant.interchange.hqq import stripes_to_codes

FORMAT = Hqq(3, 32, "hqq")


@pytest.fixture(scope="module")
def packed_checkpoint(make_checkpoint, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose linear maps are packed as hqq does, and the tensors in it."""
    source = make_checkpoint("qwen2").folder
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight"):
            parts = to_hqq(FORMAT.encode(tensor), FORMAT, *tensor.shape)
            tensors |= {name.removesuffix("weight") + part: value.clone() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    folder = tmp_path_factory.mktemp("packed")
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


@pytest.mark.parametrize("solver", ["ingle", "hqq"])
def test_codes_and_scales_are_taken_as_they_are(packed_checkpoint, solver: str) -> None:
    folder, tensors = packed_checkpoint
    base = HqqBase(format="hqq", bits=3, group_size=32, solver=solver)
    model = models.load_model(ModelConfig(id=str(folder), dtype="float32"), base)
    layer = model.model.layers[1].self_attn.q_proj
    name = "model.layers.1.self_attn.q_proj"
    codes = stripes_to_codes(tensors[f"{name}.W_q"], 3)[: tensors[f"{name}.scale"].numel()]
    assert torch.equal(bytes_to_codes(layer.codes, 3, 64).flatten(), codes.flatten())
    weight = (codes - tensors[f"{name}.zero"].float()) * tensors[f"{name}.scale"].float()
    assert torch.equal(layer.decode(torch.float32), weight.view(64, 64))
    assert torch.equal(layer.bias, tensors[f"{name}.bias"])


@pytest.mark.parametrize("base", [NoBase(), HqqBase(format="hqq"), HqqBase(format="hqq", bits=3, group_size=64)])
def test_another_format_is_refused_with_the_options_it_needs(packed_checkpoint, base: BaseConfig) -> None:
    folder, _ = packed_checkpoint
    with pytest.raises(ModelError, match="already packed as hqq") as error:
        models.load_model(ModelConfig(id=str(folder), dtype="float32"), base)
    assert error.value.fix is not None
    assert error.value.fix.startswith("--base.format=hqq --base.bits=3 --base.group_size=32")
