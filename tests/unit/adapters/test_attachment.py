"""What an adapter lands on, what it leaves alone, and what it says about both."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ingle import adapters, models
from ingle.config.adapter import LoraAdapter, NoAdapter
from ingle.config.base import Nf4Base
from ingle.config.model import ModelConfig
from ingle.errors import AdapterError
from ingle.planning.selection import MAMBA_TYPES
from ingle.quant import QuantLinear, audit, convert


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_all_linear_is_every_linear_but_the_head() -> None:
    model = llama()
    report = adapters.attach(model, LoraAdapter(rank=2), seed=0)
    assert len(report.adapted) == 2 * len(LINEARS)
    assert {name.rpartition(".")[2] for name in report.adapted} == set(LINEARS)
    assert isinstance(model.lm_head, nn.Linear)
    trained = dict(adapters.trainable_parameters(model))
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert report.trainable_parameters == sum(p.numel() for p in trained.values())
    assert {each.name for each in report.not_adapted} == {"model.embed_tokens", "lm_head"}
    assert report.adapted == adapters.select(llama(), LoraAdapter(rank=2)).adapted


def test_a_linear_with_a_way_of_its_own_is_no_linear() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = super().forward(x)
            return logits, logits.argmax(-1)

    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "router": Router(4, 2)})
    report = adapters.attach(model, LoraAdapter(rank=2), seed=0)
    assert report.adapted == ("q_proj",)
    assert "router" in {each.name for each in report.not_adapted}
    with pytest.raises(AdapterError, match="Router"):
        adapters.select(model, LoraAdapter(rank=2, target_modules=("router",)))


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (("q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("layers.1.mlp.*",), [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]),
        (("layers.0.*.[qk]_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]),
        (("model.layers.0.self_attn.v_proj", "lm_head"), ["model.layers.0.self_attn.v_proj", "lm_head"]),
    ],
)
def test_patterns_match_the_end_of_a_path(patterns: tuple[str, ...], expected: list[str]) -> None:
    assert list(adapters.select(llama(), LoraAdapter(target_modules=patterns)).adapted) == expected


@pytest.mark.parametrize(
    "patterns, fragments",
    [
        (("q_porj",), ["'q_porj' matches no linear layer", "did you mean q_proj"]),
        (("_proj",), ["'_proj' matches no linear layer"]),  # only whole parts of a path match
        (("mlp",), ["type LlamaMLP, but no linear layer", "mlp.*"]),
        (("input_layernorm",), ["type LlamaRMSNorm, but no linear layer"]),
        (("q_proj", "nothing.*"), ["'nothing.*' matches no linear layer"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_told(patterns: tuple[str, ...], fragments: list[str]) -> None:
    with pytest.raises(AdapterError) as error:
        adapters.attach(llama(), LoraAdapter(target_modules=patterns), seed=0)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_misspelt_trainable_module_is_told() -> None:
    with pytest.raises(AdapterError, match=r"'lm_haed' matches no module.*\n.*trainable_modules(.|\n)*lm_head"):
        adapters.attach(llama(), LoraAdapter(trainable_modules=("lm_haed",)), seed=0)


def test_initialisation_depends_on_seed_and_path_and_not_on_order() -> None:
    full, part, other = llama(), llama(), llama()
    adapters.attach(full, LoraAdapter(rank=4), seed=3)
    adapters.attach(part, LoraAdapter(rank=4, target_modules=("down_proj",)), seed=3)
    adapters.attach(other, LoraAdapter(rank=4), seed=4)
    name = "model.layers.1.mlp.down_proj.lora_a"
    a = full.get_parameter(name)
    assert torch.equal(a, part.get_parameter(name))
    assert not torch.equal(a, other.get_parameter(name))
    assert not torch.equal(a, full.get_parameter("model.layers.0.mlp.down_proj.lora_a"))
    bound = 128**-0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.9 * bound < a.abs().max() <= bound
    assert not full.get_parameter("model.layers.1.mlp.down_proj.lora_b").any()


def test_trainable_modules_are_saved_parameters_and_get_no_adapter() -> None:
    model = llama()
    report = adapters.attach(model, LoraAdapter(rank=2, trainable_modules=("layers.1.mlp", "norm")), seed=0)
    assert report.modules_to_save == ("model.layers.1.mlp", "model.norm")
    assert not any(name.startswith("model.layers.1.mlp") for name in report.adapted)
    assert model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad
    assert not model.get_parameter("model.layers.0.input_layernorm.weight").requires_grad


@pytest.mark.parametrize("named", ["lm_head", "embed_tokens"])
def test_tied_weights_are_explained_and_restored(named: str) -> None:
    model = llama(tied=True)
    report = adapters.attach(model, LoraAdapter(rank=2, trainable_modules=(named,)), seed=0)
    other = {"lm_head": "model.embed_tokens", "embed_tokens": "lm_head"}[named]
    assert [note for note in report.notes if note.startswith(f"{other} shares its weight")]
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    with adapters.disabled(model):
        assert torch.equal(model.lm_head.weight, before) and torch.equal(model.model.embed_tokens.weight, before)
    assert torch.equal(model.model.embed_tokens.weight, before + 1)


def test_a_weight_that_the_files_do_not_tie_stays_frozen(tmp_path: Path) -> None:
    """The config ties embedding and head, so they are one parameter until the weights are read."""
    llama(tied=False).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    section, adapter = ModelConfig(id=str(tmp_path)), LoraAdapter(rank=2, trainable_modules=("lm_head",))
    model = models.meta_model(section, "cpu", torch.float32)
    selection = adapters.insert(model, adapter)
    models.load_weights(model, section, "cpu", torch.float32)
    adapters.initialize(model, adapter, selection, seed=0)
    trained = {name for name, _ in adapters.trainable_parameters(model) if ".lora_" not in name}
    assert trained == {"lm_head.weight"}


def test_disabled_is_undone_after_an_error() -> None:
    model = llama()
    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    with pytest.raises(RuntimeError), adapters.disabled(model):
        raise RuntimeError
    assert all(module.is_on for module in adapters.lora_modules(model).values())


def test_a_packed_base_stays_packed_and_the_audit_sees_the_adapter() -> None:
    model = llama()
    base = Nf4Base(format="nf4", double_quant=False)
    convert(model, base)
    report = adapters.attach(model, LoraAdapter(rank=2), seed=0)
    assert len(report.adapted) == 14
    assert all(isinstance(m.base, QuantLinear) for m in adapters.lora_modules(model).values())
    counted = audit(model)
    assert counted.trainable == report.trainable_parameters
    with pytest.raises(AdapterError, match="stored as nf4"):
        adapters.attach(copy.deepcopy(model), LoraAdapter(trainable_modules=("layers.0.mlp",)), seed=0)
    with pytest.raises(AdapterError, match="stored as nf4"):
        adapters.attach(model, NoAdapter(kind="none"), seed=0)


def test_no_adapter_trains_everything() -> None:
    model = llama()
    report = adapters.attach(model, NoAdapter(kind="none"), seed=0)
    assert len(adapters.trainable_parameters(model)) == len(list(model.parameters()))
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_fused_experts_are_reported_and_never_passed_over(packed: bool) -> None:
    model = mixtral()
    if packed:
        convert(model, Nf4Base(format="nf4", double_quant=False))
    report = adapters.attach(model, LoraAdapter(rank=2), seed=0)
    experts = [each for each in report.not_adapted if "experts" in each.name]
    assert sum(each.parameters for each in experts) == 4 * 3 * 64 * 128
    assert any("expert" in note and f"{4 * 3 * 64 * 128:,}" in note for note in report.notes)
    assert not any("PEFT" in note for note in report.notes)
    with pytest.raises(AdapterError, match="experts"):
        adapters.attach(mixtral(), LoraAdapter(target_modules=("experts",)), seed=0)


def test_maps_that_peft_takes_for_experts_get_an_adapter_only_when_they_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, mlp_only_layers=[0],
    )  # fmt: skip
    report = adapters.attach(Qwen3MoeForCausalLM(config), LoraAdapter(rank=2), seed=0)
    attention = LINEARS[:4]
    assert {name.rpartition(".")[2] for name in report.adapted} == set(attention)
    assert any(note.startswith("3 linear layers without an adapter (model.layers.0.mlp.dow") for note in report.notes)

    named = LoraAdapter(rank=2, target_modules=LINEARS)
    model = Qwen3MoeForCausalLM(config)
    report = adapters.attach(model, named, seed=0)
    assert {name.rpartition(".")[2] for name in report.adapted} == set(LINEARS)
    assert any(note.startswith("Adapted: down_proj, gate_proj, up_proj; PEFT confuses") for note in report.notes)
    adapters.save_adapter(model, tmp_path, named, "base")
    again = adapters.attach(Qwen3MoeForCausalLM(config), named.model_copy(update={"path": str(tmp_path)}), seed=0)
    assert again.notes == report.notes, "each note once, also when the adapter comes from a folder"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_output_projections_of_mamba_get_no_adapter_because_peft_refuses_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=2)
    model, adapter = MambaForCausalLM(config), LoraAdapter(rank=2)
    report = adapters.attach(model, adapter, seed=0)
    assert {name.rpartition(".")[2] for name in report.adapted} == {"in_proj", "x_proj", "dt_proj"}
    assert any(note.startswith("2 linear layers without an adapter") and "Mamba" in note for note in report.notes)
    adapters.save_adapter(model, tmp_path, adapter, "base")
    PeftModel.from_pretrained(MambaForCausalLM(config), tmp_path)
    listed = re.search(r"mamba_model_types = \{(.*?)\}", inspect.getsource(_check_lora_target_modules_mamba))
    assert listed is not None and set(re.findall(r'"(\w+)"', listed[1])) == MAMBA_TYPES


def test_architectures_that_look_at_their_layers_still_can() -> None:
    model = llama()
    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    q_proj = model.model.layers[0].self_attn.q_proj
    assert q_proj.weight.shape == (64, 64) and q_proj.bias is None and q_proj.out_features == 64
