"""Checkpoints that bitsandbytes, hqq or BitNet has quantized: their codes and scales are loaded unchanged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from ingle import adapters, models
from ingle.config import BaseConfig, Int8Base, LoraAdapter, ModelConfig, Nf4Base, NoBase
from ingle.config.base import Fp4Base, HqqBase, LevelsBase, TernaryBase, base_section
from ingle.errors import ModelError, QuantizationError
from ingle.export.writers.merged_model import MergedModel
from ingle.export.writers.safetensors_folder import choose_layout, write_safetensors
from ingle.inference import Source
from ingle.quant import QuantLinear, QuantStack, to_hqq, to_mxfp4
from ingle.quant.hqq import Hqq, bytes_to_codes
from ingle.quant.interchange.hqq import stripes_to_codes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside torch's compiler
    from transformers.integrations.bitnet import pack_weights
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

IDS = torch.arange(12)[None]
HQQ = Hqq(3, 32, "hqq")
TERNARY = TernaryBase(format="ternary")


def load(folder: Path, base: BaseConfig) -> hf.PreTrainedModel:
    return models.load_model(ModelConfig(id=str(folder), dtype="float32"), base)


def write(source: Path, folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """Writes a copy of a checkpoint with other tensors and a ``quantization_config``."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        Nf4Base(format="nf4"),
        Nf4Base(format="nf4", double_quant=False),
        Fp4Base(format="fp4"),
        Fp4Base(format="fp4", double_quant=False),
    ],
    ids=["nf4-double", "nf4-single", "fp4-double", "fp4-single"],
)
def bitsandbytes(request, make_checkpoint, tmp_path_factory) -> tuple[Path, LevelsBase, Tensor]:
    """A checkpoint that transformers and bitsandbytes quantized, and their logits."""
    pytest.importorskip("bitsandbytes")
    base = request.param
    settings = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.format,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    source = make_checkpoint("qwen2").folder
    model = hf.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("bitsandbytes")
    model.save_pretrained(folder)
    # With gradients on, bitsandbytes multiplies by the decoded weight; without, in bfloat16.
    return folder, base, model(input_ids=IDS, use_cache=False).logits.detach()


@pytest.fixture(scope="module")
def hqq(make_checkpoint, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in the ``hqq`` package's layout, and its tensors."""
    source = make_checkpoint("qwen2").folder
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight"):
            parts = to_hqq(HQQ.encode(tensor), HQQ, *tensor.shape)
            tensors |= {name.removesuffix("weight") + part: value.clone() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    return write(source, tmp_path_factory.mktemp("hqq"), tensors, {"quant_method": "hqq"}), tensors


@pytest.fixture(scope="module", params=["bitlinear", "autobitlinear"])
def bitnet(request, make_checkpoint, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A BitNet checkpoint, and the weights of an ordinary one with the same values."""
    source = make_checkpoint("llama").folder
    tensors = load_file(source / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        codes = (weight / weight.abs().mean()).round().clamp(-1, 1)
        stored[name] = pack_weights(codes.clone())
        # The two layers read scales that are the inverse of each other.
        stored[f"{name}_scale"] = torch.tensor([32.0 if request.param == "bitlinear" else 0.03125])
        tensors[name] = codes * 0.03125
    settings = {"quant_method": "bitnet", "linear_class": request.param, "quantization_mode": "offline"}
    return write(source, tmp_path_factory.mktemp(request.param), stored, settings), tensors


def require_trains(model: hf.PreTrainedModel) -> None:
    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    model.train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = [p.grad for name, p in adapters.trainable_parameters(model) if name.endswith("lora_b")]
    assert gradients and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_bitsandbytes_codes_are_loaded_unchanged(bitsandbytes) -> None:
    folder, base, expected = bitsandbytes
    model = load(folder, base)
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.down_proj.codes.flatten(), stored.flatten())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    require_trains(model)


@pytest.mark.parametrize("base", [NoBase(), Int8Base(format="int8"), Nf4Base(format="nf4", block_size=128)])
def test_another_base_than_that_of_bitsandbytes_is_refused_with_the_options(bitsandbytes, base: BaseConfig) -> None:
    folder, stored, _ = bitsandbytes
    with pytest.raises(ModelError) as error:
        load(folder, base)
    assert error.value.fix == (
        f"--base.format={stored.format} --base.block_size=64 --base.double_quant={str(stored.double_quant).lower()}"
    )


@pytest.mark.parametrize("solver", ["ingle", "hqq"])
def test_hqq_codes_and_scales_are_loaded_unchanged(hqq, solver: str) -> None:
    folder, tensors = hqq
    model = load(folder, HqqBase(format="hqq", bits=3, group_size=32, solver=solver))
    layer, name = model.model.layers[1].self_attn.q_proj, "model.layers.1.self_attn.q_proj"
    codes = stripes_to_codes(tensors[f"{name}.W_q"], 3)[: tensors[f"{name}.scale"].numel()]
    assert torch.equal(bytes_to_codes(layer.codes, 3, 64).flatten(), codes.flatten())
    weight = (codes - tensors[f"{name}.zero"].float()) * tensors[f"{name}.scale"].float()
    assert torch.equal(layer.decode(torch.float32), weight.view(64, 64))
    assert torch.equal(layer.bias, tensors[f"{name}.bias"])


@pytest.mark.parametrize("base", [NoBase(), HqqBase(format="hqq"), HqqBase(format="hqq", bits=3, group_size=64)])
def test_another_base_than_that_of_hqq_is_refused_with_the_options(hqq, base: BaseConfig) -> None:
    with pytest.raises(ModelError, match="already quantized as hqq") as error:
        load(hqq[0], base)
    assert str(error.value.fix).startswith("--base.format=hqq --base.bits=3 --base.group_size=32")


def test_bitnet_codes_and_scales_are_loaded_unchanged(bitnet) -> None:
    folder, expected = bitnet
    model = load(folder, TERNARY)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 7 * model.config.num_hidden_layers
    for name, layer in layers.items():
        assert torch.equal(layer.decode(torch.float32), expected[f"{name}.weight"])
    assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"])
    require_trains(model)


@pytest.mark.parametrize("base", [NoBase(), TernaryBase(format="ternary", group_size="row")])
def test_another_base_than_that_of_bitnet_is_refused_with_the_options(bitnet, base: BaseConfig) -> None:
    with pytest.raises(ModelError, match="already quantized as ternary") as error:
        load(bitnet[0], base)
    assert error.value.fix == "--base.format=ternary --base.group_size=tensor"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "their own norms"),
    ],
)
def test_other_quantized_checkpoints_are_refused_before_reading(
    make_checkpoint, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    write(make_checkpoint("llama").folder, tmp_path, {}, settings)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, TERNARY)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[Path, hf.PreTrainedModel]:
    """A checkpoint in the layout of gpt-oss, and the model of transformers with the decoded experts."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = hf.GptOssConfig(**sizes, **heads, sliding_window=8, max_position_embeddings=64, pad_token_id=0)
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = parameter.detach().clone()
                continue
            experts, columns, rows = parameter.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 125, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    source = tmp_path_factory.mktemp("source")
    config.save_pretrained(source)
    return write(source, tmp_path_factory.mktemp("gpt_oss"), tensors, {"quant_method": "mxfp4"}), model


def test_experts_in_mxfp4_keep_their_codes(gpt_oss: tuple[Path, hf.PreTrainedModel]) -> None:
    folder, theirs = gpt_oss
    base = models.stored_base(ModelConfig(id=str(folder)))
    assert base.format == "mxfp4"
    model = load(folder, base)
    stored = load_file(folder / "model.safetensors")
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, QuantStack)}
    assert len(stacks) == 4 and not any(isinstance(module, QuantLinear) for module in model.modules())
    for name, stack in stacks.items():
        for part, tensor in to_mxfp4(stack.planes()).items():
            assert torch.equal(tensor, stored[f"{name}_{part}"])
    with torch.no_grad():
        actual, expected = (each(input_ids=IDS, use_cache=False).logits for each in (model, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_experts_in_mxfp4_are_exported_as_numbers(
    gpt_oss: tuple[Path, hf.PreTrainedModel], tokenizer_factory, tmp_path: Path
) -> None:
    folder, theirs = gpt_oss
    section = ModelConfig(id=str(folder), dtype="float32")
    merged = MergedModel(Source(section, models.stored_base(section)))
    layout = choose_layout("f32", NoBase())
    write_safetensors(merged, tokenizer_factory(eos="<|im_end|>"), section, tmp_path, layout)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        actual, expected = (each(input_ids=IDS, use_cache=False).logits for each in (again, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_experts_in_mxfp4_are_exported_in_the_same_bytes(
    gpt_oss: tuple[Path, Any], tokenizer_factory, tmp_path: Path
) -> None:
    section = ModelConfig(id=str(gpt_oss[0]), dtype="float32")
    base = models.stored_base(section)
    layout = choose_layout("mxfp4", base)
    write_safetensors(
        MergedModel(Source(section, base)), tokenizer_factory(eos="<|im_end|>"), section, tmp_path, layout
    )
    theirs, ours = load_file(gpt_oss[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    packed = [key for key in theirs if key.endswith(("_blocks", "_scales"))]
    assert len(packed) == 8 and all(torch.equal(ours[key], theirs[key]) for key in packed)
    assert models.stored_base(ModelConfig(id=str(tmp_path))) == base


def test_mxfp4_is_for_models_that_are_published_in_it(gpt_oss: tuple[Path, Any], make_checkpoint) -> None:
    with pytest.raises(ModelError, match="cannot be loaded in another format") as error:
        load(gpt_oss[0], NoBase())
    assert "--base.format=mxfp4" in str(error.value)
    with pytest.raises(QuantizationError, match="no experts"):
        load(make_checkpoint("qwen2").folder, base_section("mxfp4"))
