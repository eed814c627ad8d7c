"""Checkpoints as they are published: one key for each expert, shards, ties, old names, missing weights, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from ingle import models
from ingle.config import BaseConfig, ModelConfig, Nf4Base, NoBase
from ingle.errors import ModelError
from ingle.events import Event, Progress, Warned
from ingle.models.loading.safetensors_files import read_index

IDS = torch.arange(12)[None]


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(source: Path, folder: Path, tensors: dict[str, Tensor], **config: object) -> ModelConfig:
    """Writes a copy of a checkpoint with other tensors and config values."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = {**json.loads((source / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(values))
    return ModelConfig(id=str(folder), dtype="float32")


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen2_moe", "model.layers.1.mlp.experts.3.down_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_every_expert_has_its_own_key_on_disk(make_checkpoint, name: str, key: str) -> None:
    keys = read_index(make_checkpoint(name).folder)
    assert key in keys
    assert not any("gate_up_proj" in each for each in keys)


def test_experts_of_a_mixtral_checkpoint_are_fused_in_the_right_order(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("mixtral")
    reference = checkpoint.reference()
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if ".experts." not in name}
    tensors = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): value for name, value in tensors.items()}
    for layer in range(2):
        experts = reference.model.layers[layer].mlp.experts
        for expert in range(4):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate, up = experts.gate_up_proj[expert].chunk(2)
            tensors |= {
                f"{prefix}.w1.weight": gate,
                f"{prefix}.w3.weight": up,
                f"{prefix}.w2.weight": experts.down_proj[expert],
            }
    config = write(checkpoint.folder, tmp_path / "m", {name: value.detach() for name, value in tensors.items()})
    torch.testing.assert_close(logits(models.load_model(config)), logits(reference))


def test_old_gpt2_checkpoint_without_prefix_and_with_masks(make_checkpoint, tmp_path: Path) -> None:
    """The first GPT-2 on the hub has the names of the bare decoder, and causal masks that are not used."""
    checkpoint = make_checkpoint("gpt2")
    tensors = {name.removeprefix("transformer."): value for name, value in read(checkpoint.folder).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    events: list[Event] = []
    model = models.load_model(write(checkpoint.folder, tmp_path / "m", tensors), sink=events.append)
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()), rtol=1e-5, atol=1e-5)
    assert not [event for event in events if isinstance(event, Warned)]


def test_a_missing_expert_is_an_error(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3_moe")
    tensors = {name: value for name, value in read(checkpoint.folder).items() if ".experts.3." not in name}
    with pytest.raises(ModelError, match=r"gate_up_proj|down_proj") as error:
        models.load_model(write(checkpoint.folder, tmp_path / "m", tensors))
    assert "(3," in str(error.value) and "(4," in str(error.value)


def test_shards_are_joined_and_progress_is_reported(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    reference = checkpoint.reference()
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    events: list[Event] = []
    model = models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), sink=events.append)
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()), rtol=1e-5, atol=1e-5)
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress and progress[-1].done == progress[-1].total


@pytest.mark.parametrize("present", ["embedding", "head", "both"])
def test_tied_weights_are_one_tensor_whichever_name_is_on_disk(make_checkpoint, tmp_path: Path, present: str) -> None:
    checkpoint = make_checkpoint("llama-tied")
    tensors = read(checkpoint.folder)
    if present != "embedding":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if present == "head":
        del tensors["model.embed_tokens.weight"]
    model = models.load_model(write(checkpoint.folder, tmp_path / "m", tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()), rtol=1e-5, atol=1e-5)


def test_two_values_for_a_tied_weight_are_kept_apart_with_a_warning(make_checkpoint, tmp_path: Path, tokenizer) -> None:
    checkpoint = make_checkpoint("llama-tied")
    tensors = read(checkpoint.folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    events: list[Event] = []
    config = write(checkpoint.folder, tmp_path / "m", tensors)
    model = models.load_model(config, sink=events.append)
    assert [event.message for event in events if isinstance(event, Warned)]
    assert not model.config.tie_word_embeddings
    reference = hf.AutoModelForCausalLM.from_pretrained(config.id, dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(reference))
    models.save_pretrained(model, tokenizer, tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_missing_weights_are_an_error_and_unused_ones_a_warning(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    tensors = read(checkpoint.folder)
    unused = {**tensors, "classifier.weight": torch.zeros(2, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": IDS}
    events: list[Event] = []
    models.load_model(write(checkpoint.folder, tmp_path / "unused", unused), sink=events.append)
    warned = [event for event in events if isinstance(event, Warned)]
    assert len(warned) == 1 and warned[0].count == 1 and "classifier.weight" in warned[0].message
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load_model(write(checkpoint.folder, tmp_path / "missing", tensors))


def test_an_optional_weight_that_is_missing_is_initialised(make_checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hf.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"model\.norm\.weight"])
    checkpoint = make_checkpoint("llama")
    tensors = read(checkpoint.folder)
    del tensors["model.norm.weight"]
    model = models.load_model(write(checkpoint.folder, tmp_path / "m", tensors))
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert model.model.norm.weight.requires_grad


def test_a_weight_of_another_shape_is_an_error(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    for base in (NoBase(), Nf4Base(format="nf4")):
        with pytest.raises(ModelError, match="does not have the shape") as error:
            models.load_model(
                write(checkpoint.folder, tmp_path / base.format, read(checkpoint.folder), intermediate_size=192), base
            )
        assert "192" in str(error.value) and "128" in str(error.value)


def test_weights_are_converted_to_the_compute_type(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    config = ModelConfig(id=str(checkpoint.folder), dtype="bfloat16")
    model = models.load_model(config)
    reference = hf.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # Frequencies stay exact: a bfloat16 angle would be wrong by whole turns.
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 million random weights in several shards."""
    folder = tmp_path_factory.mktemp("large")
    config = hf.LlamaConfig(
        vocab_size=4000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")
    return folder


def probe_memory(tiny: Path, large: Path, base: BaseConfig) -> dict[str, int]:
    probe = Path(__file__).with_name("memory_probe.py")
    result = subprocess.run(
        [sys.executable, str(probe), str(tiny), str(large), base.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("base", [NoBase(), Nf4Base(format="nf4")], ids=lambda base: base.format)
def test_peak_memory_is_the_model_and_one_tensor(
    large_checkpoint: Path, make_checkpoint: Callable, base: BaseConfig
) -> None:
    """Measured in separate processes, relative to the memory after loading a tiny model.

    The lowest of three peaks counts: sometimes the allocator keeps freed memory, but a second copy would always show.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory cannot be reset here")
    tiny = make_checkpoint("llama").folder
    whole = sum(entry.num_bytes for entry in read_index(large_checkpoint).values())
    # The encoder works in float32 with a few intermediate results of one tensor.
    slack = 12 << 20  # Python objects of two models on the meta device, file buffers
    for _ in range(3):
        took = probe_memory(tiny, large_checkpoint, base)
        working = took["largest"] * (1 if base.format == "none" else 4)
        if took["peak"] <= took["final"] + working + slack:
            break
    assert took["peak"] <= took["final"] + working + slack, took
    if base.format == "nf4":
        assert took["peak"] < 0.75 * whole, "the model was in memory without quantization"
