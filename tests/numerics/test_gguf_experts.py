"""Experts of GGUF files keep the bytes of the file; transformers computes the same with the decoded tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ingle.config.base import NoBase
from ingle.config.model import ModelConfig
from ingle.events import Warned
from ingle.gguf import GgufFile, TensorToWrite, read_gguf, write_gguf
from ingle.models import convert_base, load_weights
from ingle.models.loading.gguf_model import read_gguf_config
from ingle.models.loading.meta_device import build
from ingle.quant import GgufFormats, QuantStack
from tests.numerics.test_gguf_families import CASES, written

IDS = torch.tensor([[5, 700, 44, 4000, 3, 17, 17, 999, 8, 21]])
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
#: Types of gate, up and down in the first layer; all others are q4_k, or mxfp4 for gpt-oss.
MIXED = {"mixtral": ("q4_k", "q4_k", "q6_k"), "qwen3_moe": ("q4_k", "q5_k", "q6_k"), "gpt_oss": ("mxfp4",) * 3}


def quantized(file: GgufFile, path: Path, types: tuple[str, str, str]) -> GgufFile:
    """A copy of a file of plain numbers with quantized experts."""
    tensors = []
    for tensor in file.tensors.values():
        kind = tensor.type_name
        part = next(
            (n for n, part in enumerate(("gate", "up", "down")) if f"ffn_{part}_exps.weight" in tensor.name), None
        )
        if part is not None:
            kind = types[part] if tensor.name.startswith("blk.0.") or types[part] == "mxfp4" else "q4_k"

        def data(tensor: Any = tensor, kind: str = kind) -> np.ndarray[Any, Any]:
            if kind == "f32":
                return tensor.read()
            values = torch.from_numpy(tensor.read()).view(torch.float32).reshape(-1, tensor.shape[-1])
            if kind == "mxfp4":  # Ingle only reads it
                return gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.MXFP4)
            format = GgufFormats()(kind)
            assert format is not None
            return format.encode(values)["data"].numpy()

        tensors.append(TensorToWrite(tensor.name, kind, tensor.shape, data))
    write_gguf(path, file.metadata, tensors)
    return read_gguf(path)


def decoded(file: GgufFile, name: str) -> Tensor:
    """The values of a tensor by the ``gguf`` package."""
    tensor = file.tensors[name]
    kind = gguf.GGMLQuantizationType[tensor.type_name.upper()]
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.read(), kind))).view(tensor.shape)


@pytest.fixture(scope="module", params=MIXED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GgufFile]:
    """A model of transformers with the decoded experts, and the file."""
    model_type, settings = CASES[request.param]
    sizes = WIDE | ({"moe_intermediate_size": 256} if "moe_intermediate_size" in settings else {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.08)
    folder = tmp_path_factory.mktemp(request.param)
    file = quantized(written(model, folder / "plain.gguf"), folder / "model.gguf", MIXED[request.param])
    for layer in range(2):
        gate, up, down = (decoded(file, f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        if model_type == "gpt_oss":
            experts.gate_up_proj.data = torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous()
            experts.down_proj.data = down.transpose(1, 2).contiguous()
        else:
            experts.gate_up_proj.data, experts.down_proj.data = torch.cat([gate, up], 1), down
    return model, file


def loaded(file: GgufFile) -> tuple[Any, list[str]]:
    """The model in a file on transformers' own attention, and the warnings."""
    events: list[Any] = []
    section = ModelConfig(id=str(file.path), dtype="float32")
    model = build(read_gguf_config(file)[0], torch.float32)
    convert_base(model, section, NoBase())
    load_weights(model, section, "cpu", torch.float32, sink=events.append)
    model.set_attn_implementation("eager")
    return model.eval(), [event.message for event in events if isinstance(event, Warned)]


def test_experts_answer_and_differentiate_as_the_decoded_tensors(case: tuple[Any, GgufFile]) -> None:
    reference, file = case
    model, warnings = loaded(file)
    outputs = []
    for each in (model, reference):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = each(inputs_embeds=embedded).logits
        logits.square().mean().backward()
        outputs.append((logits.detach(), embedded.grad))
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    assert not warnings  # also where the gate of a layer has another type than its up


def test_experts_hold_the_bytes_of_the_file(case: tuple[Any, GgufFile]) -> None:
    model, _ = loaded(case[1])
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, QuantStack)}
    tensors, held = case[1].tensors, {name: module.get_parameter("data") for name, module in stacks.items()}
    mixed = stacks["model.layers.0.mlp.experts.gate_up_proj"]
    if mixed.format.name == "q4_k+q5_k":
        for plane, part in (("data", "gate"), ("data_1", "up")):
            stored = torch.from_numpy(tensors[f"blk.0.ffn_{part}_exps.weight"].read()).view(4, 256, -1)
            assert torch.equal(mixed.get_parameter(plane), stored)
    gate, up, down = (
        torch.from_numpy(tensors[f"blk.1.ffn_{part}_exps.weight"].read()).view(4, 256, -1)
        for part in ("gate", "up", "down")
    )
    alternates = case[1].metadata["general.architecture"] == "gpt-oss"
    both = torch.stack([gate, up], 2).flatten(1, 2) if alternates else torch.cat([gate, up], 1)
    assert torch.equal(held["model.layers.1.mlp.experts.gate_up_proj"], both)
    assert torch.equal(held["model.layers.1.mlp.experts.down_proj"], down)
