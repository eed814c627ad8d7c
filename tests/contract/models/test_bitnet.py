"""QuantModule BitNet checkpoints: codes and scale are taken as they are, whichever way the scale goes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ingle import adapters, models
from ingle.config import LoraAdapter, ModelConfig, NoBase
from ingle.config.base import TernaryBase
from ingle.errors import ModelError
from ingle.quant import QuantLinear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecations, in what its compiler imports
    from transformers.integrations.bitnet import pack_weights

IDS = torch.arange(12).unsqueeze(0)


@pytest.fixture(scope="module", params=["bitlinear", "autobitlinear"])
def checkpoint(request, make_checkpoint, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A packed checkpoint, and the weights of an ordinary one that means the same."""
    source = make_checkpoint("llama").folder
    tensors = load_file(source / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, weight in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        codes = (weight / weight.abs().mean()).round().clamp(-1, 1)
        scale = torch.tensor([32.0 if request.param == "bitlinear" else 0.03125])  # the inverse of each other
        packed[name] = pack_weights(codes.clone())
        packed[f"{name}_scale"] = scale
        tensors[name] = codes * 0.03125
    folder = tmp_path_factory.mktemp(request.param)
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, folder / "model.safetensors")
    settings = {"quant_method": "bitnet", "linear_class": request.param, "quantization_mode": "offline"}
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder, tensors


def test_codes_and_scale_are_taken_as_they_are(checkpoint) -> None:
    folder, expected = checkpoint
    model = models.load_model(ModelConfig(id=str(folder), dtype="float32"), TernaryBase(format="ternary"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 7 * model.config.num_hidden_layers
    for name, layer in layers.items():
        assert torch.equal(layer.decode(torch.float32), expected[f"{name}.weight"])
    assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"])


def test_an_adapter_trains_on_it(checkpoint) -> None:
    folder, _ = checkpoint
    model = models.load_model(ModelConfig(id=str(folder), dtype="float32"), TernaryBase(format="ternary"))
    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    model(input_ids=IDS).logits.square().mean().backward()
    gradients = [p.grad.abs().sum() for name, p in model.named_parameters() if name.endswith("lora_b")]
    assert gradients and all(gradient > 0 for gradient in gradients)


@pytest.mark.parametrize("base", [NoBase(), TernaryBase(format="ternary", group_size="row")])
def test_another_format_is_refused_with_the_options_it_needs(checkpoint, base) -> None:
    folder, _ = checkpoint
    with pytest.raises(ModelError, match="already quantized as ternary") as caught:
        models.load_model(ModelConfig(id=str(folder), dtype="float32"), base)
    assert caught.value.fix == "--base.format=ternary --base.group_size=tensor"


def test_layers_with_norms_of_their_own_are_refused(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["use_rms_norm"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="their own norms"):
        models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), TernaryBase(format="ternary"))
