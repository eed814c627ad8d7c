"""Adapters against PEFT: logits in both directions through the files, and gradients of a complete model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from ingle import adapters
from ingle.config.adapter import LoraAdapter, QaLoraAdapter
from ingle.config.base import base_section
from ingle.errors import AdapterError
from ingle.quant import QuantLinear, convert
from tests.tiny import SIZES

IDS = torch.arange(20).view(2, 10) * 7 % 50

# PEFT uses a deprecated name of transformers and warns of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def move(model: torch.nn.Module, seed: int = 1) -> None:
    """Sets every trained parameter to something that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def through_peft(base: PreTrainedModel, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(base, str(folder)).eval())


@pytest.mark.parametrize(
    "adapter",
    [
        LoraAdapter(rank=4),
        LoraAdapter(rank=4, alpha=3.0, rslora=True),
        LoraAdapter(rank=2, target_modules=("q_proj", "layers.1.mlp.*")),
        LoraAdapter(rank=2, target_modules=("v_proj",), trainable_modules=("lm_head", "layers.0.mlp.up_proj")),
        LoraAdapter(rank=2, trainable_modules=("embed_tokens", "model.norm")),
        LoraAdapter(rank=2, target_modules=("o_proj", "lm_head")),
    ],
    ids=["all", "rslora", "patterns", "head-saved", "embeddings-saved", "head-adapted"],
)
def test_a_saved_adapter_answers_the_same_in_peft_and_when_loaded(adapter: LoraAdapter, tmp_path: Path) -> None:
    model = llama()
    base = logits(model)
    adapters.attach(model, adapter, seed=0)
    torch.testing.assert_close(logits(model), base)  # B is zero: training starts from the base
    move(model)
    ours = logits(model)
    assert (ours - base).abs().max() > 0.1
    adapters.save_adapter(model, tmp_path, adapter, "some/base")
    torch.testing.assert_close(through_peft(llama(), tmp_path), ours, rtol=1e-5, atol=1e-5)
    again = llama()
    report = adapters.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), ours, rtol=1e-6, atol=1e-6)
    assert set(report.adapted) == set(adapters.lora_modules(model))
    with adapters.disabled(again):
        torch.testing.assert_close(logits(again), base, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(again), ours, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    settings = adapters.adapter_config(tmp_path)
    assert (settings.rank, settings.scale, settings.rslora) == (adapter.rank, adapter.scale, adapter.rslora)


def test_conv1d(tmp_path: Path) -> None:
    model, adapter = gpt2(), LoraAdapter(rank=4, target_modules=("c_attn", "mlp.c_proj"))
    adapters.attach(model, adapter, seed=0)
    move(model)
    adapters.save_adapter(model, tmp_path, adapter, "base")
    torch.testing.assert_close(through_peft(gpt2(), tmp_path), logits(model), rtol=1e-5, atol=1e-5)


#: Dense layers or shared experts next to fused ones, under one name.
EXPERTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        },
    ),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8}),
    "qwen2_moe": (Qwen2MoeConfig, {"num_experts": 4, "shared_expert_intermediate_size": 16}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT's own translation of names
@pytest.mark.parametrize("name", EXPERTS)
def test_an_adapter_on_all_linear_maps_is_read_alike_with_fused_experts(name: str, tmp_path: Path) -> None:
    def fresh() -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        config, options = EXPERTS[name]
        numbers = SIZES | sizes | {"vocab_size": 50, "num_key_value_heads": 4}
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config(**numbers, **options)).eval()
        return made

    def error(adapter: LoraAdapter, folder: Path) -> float:
        model = fresh()
        adapters.attach(model, adapter, seed=0)
        move(model)
        adapters.save_adapter(model, folder, adapter, "base")
        ours = logits(model)
        return float((through_peft(fresh(), folder) - ours).abs().max() / ours.abs().max())

    assert error(LoraAdapter(rank=4), tmp_path / "all") < 1e-5
    # What is left out by default is left out for a reason, and nothing else is.
    like_experts = LoraAdapter(rank=4, target_modules=("gate_proj", "up_proj", "down_proj"))
    assert (error(like_experts, tmp_path / "like-experts") < 1e-5) == (name == "qwen2_moe")


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_trained_and_saved_together(named: str, tmp_path: Path) -> None:
    model, adapter = llama(tied=True), LoraAdapter(rank=4, trainable_modules=(named,))
    report = adapters.attach(model, adapter, seed=0)
    assert any("shares its weight" in note for note in report.notes)
    base = logits(model)
    move(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapters.save_adapter(model, tmp_path, adapter, "base")
    torch.testing.assert_close(through_peft(llama(tied=True), tmp_path), logits(model), rtol=1e-5, atol=1e-5)
    again = llama(tied=True)
    adapters.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)
    with adapters.disabled(again):
        torch.testing.assert_close(logits(again), base)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
        {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"r": 4, "lora_alpha": -8, "layers_to_transform": [1], "layers_pattern": ""},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "ends-so", "some-layers"],
)
def test_an_adapter_saved_by_peft_loads(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    move(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = llama()
    adapters.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_tied_modules_saved_by_peft_load(named: str, together: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=[named], ensure_weight_tying=together, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(tied=True), config).eval()
    move(theirs)
    theirs.save_pretrained(str(tmp_path))
    expected = through_peft(llama(tied=True), tmp_path)
    ours = llama(tied=True)
    base = logits(ours)
    report = adapters.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert any("keeps its own weight" in note for note in report.notes) != together
    with adapters.disabled(ours):
        torch.testing.assert_close(logits(ours), base)
    again = LoraAdapter(rank=4, alpha=8, target_modules=("q_proj",), trainable_modules=(named,), path=str(tmp_path))
    if together:
        adapters.attach(llama(tied=True), again, seed=0)
    else:
        with pytest.raises(AdapterError, match="this model ties their weights"):
            adapters.attach(llama(tied=True), again, seed=0)


def test_both_ends_of_a_tie_saved_by_peft_load(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(tied=True), config).eval()
    move(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = llama(tied=True)
    adapters.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), through_peft(llama(tied=True), tmp_path), rtol=1e-5, atol=1e-5)


def peft_model(ours: torch.nn.Module, base: PreTrainedModel) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's model with the A and B of ours, and those by the names ours gives them."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(base, config)
    halves = {}
    for key, parameter in reference.named_parameters():
        if ".lora_" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".default.weight")
            halves[name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = parameter
            with torch.no_grad():
                parameter.copy_(ours.get_parameter(name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")))
    return reference, halves


def loss_of(model: Any) -> torch.Tensor:
    logits = model(IDS).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)], ids=str)
def test_loss_and_every_gradient_equal_peft_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    """The complete model: ours in ``dtype`` against PEFT's in float32 over the same weights.

    In bfloat16 the bound is the error of PEFT with a bfloat16 base, whose products with A and B are in float32.
    """
    ours = llama().to(dtype)
    adapters.attach(ours, LoraAdapter(rank=4), seed=0)
    move(ours)
    exact, exact_halves = peft_model(ours, llama().to(dtype).float())
    peer, peer_halves = peft_model(ours, llama().to(dtype))
    losses = [loss_of(model) for model in (ours, exact, peer)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) <= tolerance * losses[1] / 10
    errors = []
    for name, wanted in exact_halves.items():
        gradient, size = ours.get_parameter(name).grad, wanted.grad.norm()
        assert gradient.dtype == torch.float32
        errors.append(((gradient - wanted.grad).norm() / size, (peer_halves[name].grad - wanted.grad).norm() / size))
        assert errors[-1][0] <= tolerance, name
    if dtype == torch.bfloat16:
        assert sum(ours for ours, _ in errors) <= 1.6 * sum(peer for _, peer in errors)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_qa_lora_answers_the_same_in_peft(dropout: float, tmp_path: Path) -> None:
    """PEFT reads it as plain LoRA on the base's decoded weights and ignores Ingle's record."""
    model, reference = llama(), llama()
    convert(model, base_section("q5_1"))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            reference.get_submodule(name).weight.data = module.decode(torch.float32)
    adapter = QaLoraAdapter(kind="qa_lora", rank=4, dropout=dropout, rslora=True)
    adapters.attach(model, adapter, seed=0)
    identity = adapters.identify(model)
    move(model)
    model.eval()
    base = base_section("q5_1")
    adapters.save_adapter(model, tmp_path, adapter, "some/base", base=base, identity=identity)
    ours = logits(model)
    torch.testing.assert_close(through_peft(reference, tmp_path), ours, rtol=1e-5, atol=1e-5)
    with adapters.disabled(model):
        assert (logits(model) - ours).abs().max() > 0.1
