"""Adapter folders in PEFT's layout; damaged, foreign and unsupported ones are refused with an explanation."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ingle import adapters
from ingle.adapters import peft_config
from ingle.config.adapter import LoraAdapter
from ingle.errors import AdapterError
from tests.tiny import SIZES


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


ADAPTER = LoraAdapter(rank=2, target_modules=("q_proj", "up_proj"))


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    model = llama()
    adapters.attach(model, ADAPTER, seed=0)
    adapters.save_adapter(model, tmp_path, ADAPTER, "base")
    return tmp_path


def refusal(folder: Path, model: Any = None) -> str:
    with pytest.raises(AdapterError) as error:
        adapters.load_adapter(model or llama(), folder)
    return str(error.value)


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def test_the_names_in_the_files_are_pefts(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert A in tensors and B in tensors and len(tensors) == 8
    assert tensors[A].shape == (2, 64) and tensors[B].shape == (64, 2)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "up_proj"] and settings["peft_type"] == "LORA"
    assert settings["lora_alpha"] == 4 and settings["r"] == 2


def test_target_names_are_paths_where_the_last_part_is_not_enough(tmp_path: Path) -> None:
    model, adapter = llama(), LoraAdapter(rank=2, target_modules=("layers.1.mlp.up_proj",))
    adapters.attach(model, adapter, seed=0)
    adapters.save_adapter(model, tmp_path, adapter, "base")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["model.layers.1.mlp.up_proj"]


def test_missing_files(folder: Path) -> None:
    assert "contains no adapter" in refusal(folder / "nowhere")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in refusal(folder)


def test_damaged_files(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refusal(folder)
    weights.write_bytes(content)
    (folder / "adapter_config.json").write_text("{")
    assert "config cannot be read" in refusal(folder)
    (folder / "adapter_config.json").write_text("[]")
    assert "config cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda t: t.pop(A), "The adapter of model.layers.0.self_attn.q_proj is incomplete"),
        (lambda t: [t.pop(A), t.pop(B)], "The adapter of model.layers.0.self_attn.q_proj is missing"),
        (lambda t: t.clear(), "contains no adapter"),
        (lambda t: t.update({A: torch.zeros(2, 60)}), "does not have the sizes"),
        (lambda t: t.update({A: torch.zeros(3, 64)}), "has rank 3, but its config says 2"),
        (lambda t: t.update({A: t[A] * float("nan")}), "NaN"),
        (lambda t: t.update({A: torch.zeros(2, 64, dtype=torch.int8)}), "not a matrix of floating-point numbers"),
        (lambda t: t.update({A: torch.tensor(1.0)}), "not a matrix of floating-point numbers"),
        (lambda t: t.update({A.replace("weight", "default.weight"): t[A].clone()}), "twice"),
        (lambda t: t.update({A.replace("lora_A.weight", "bias"): torch.zeros(64)}), "not part of a supported adapter"),
        (lambda t: t.update({k.replace("layers.0", "layers.7"): t[k].clone() for k in (A, B)}), "does not have"),
        (lambda t: t.update({k.replace("self_attn.q_proj", "mlp"): t[k].clone() for k in (A, B)}), "does not target"),
    ],
)
def test_wrong_tensors(folder: Path, change: Any, fragment: str) -> None:
    edit_tensors(folder, change)
    assert fragment in refusal(folder)


@pytest.mark.parametrize(
    "settings, fragment",
    [
        ({"peft_type": "VERA"}, "VERA has no option"),
        ({"peft_type": "XLORA"}, "type XLORA"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"r": None}, "adapter_config.json: r"),
        ({"r": True}, "adapter_config.json: r"),
        ({"r": 0}, "adapter_config.json: r"),
        ({"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha"),
        ({"lora_alpha": "4"}, "adapter_config.json: lora_alpha"),
        ({"lora_dropout": 1.5}, "adapter_config.json: lora_dropout"),
        ({"rank_pattern": {"q_proj": -1}}, "adapter_config.json: rank_pattern.q_proj"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "adapter_config.json: alpha_pattern.q_proj"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": "((a{1000}){1000}){1000}"}, "repeats too often"),
        ({"target_modules": 7}, "adapter_config.json: target_modules"),
    ],
)
def test_settings_that_ingle_cannot_compute_are_refused(folder: Path, settings: dict[str, Any], fragment: str) -> None:
    edit_config(folder, **settings)
    assert fragment in refusal(folder)
    with pytest.raises(AdapterError):
        adapters.adapter_config(folder)


@pytest.mark.parametrize(
    "settings, fragment",
    [
        ({"use_dora": True}, "implies A, B, magnitude_vector"),
        ({"r": 4}, "has rank 2, but its config says 4"),
        ({"rank_pattern": {"layers.1.mlp.up_proj": 8}}, "model.layers.1.mlp.up_proj has rank 2, but its config says 8"),
        ({"target_modules": ["nowhere"]}, "does not target"),
        ({"target_modules": ["q_proj"]}, "does not target model.layers.0.mlp.up_proj"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "v_proj"),
        ({"target_modules": r".*\.q_proj"}, "does not target"),
        ({"exclude_modules": ["up_proj"]}, "does not target"),
        ({"layers_to_transform": [0]}, "does not target model.layers.1"),
        ({"modules_to_save": ["lm_head"]}, "The weights of lm_head are missing"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    folder: Path, settings: dict[str, Any], fragment: str
) -> None:
    edit_config(folder, **settings)
    assert fragment in refusal(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"(?:.|.)*[XY]$"},
        {"exclude_modules": r"(?:.|.)*[XY]$"},
        {"rank_pattern": {r"(?:.+?)+?(?=X)": 2}},
        {"layers_to_transform": [0], "layers_pattern": r"(?:.|.)*[XY]"},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_a_regular_expression_that_backtracks_for_minutes_is_refused_in_any_thread(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_config, "MATCHING_TIME_S", 0.05)
    edit_config(folder, **settings)
    with ThreadPoolExecutor() as pool:
        assert "cannot be matched in time" in pool.submit(refusal, folder).result()


def test_nested_repetition_that_matches_at_once_is_accepted(folder: Path) -> None:
    edit_config(folder, target_modules=r"(\w+\.)+(q_proj|up_proj)", rank_pattern={"(a+)+$": 7})
    assert adapters.load_adapter(llama(), folder).notes == ()


def test_an_adapter_of_another_module_than_a_linear_layer_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({k.replace("self_attn.q_proj", "mlp"): t[k].clone() for k in (A, B)}))
    edit_config(folder, target_modules=["q_proj", "up_proj", "mlp"])
    assert "LlamaMLP" in refusal(folder)


def test_other_ways_to_name_the_same_modules_are_accepted_and_unknown_names_are_reported(folder: Path) -> None:
    for targets in (r".*\.(q_proj|up_proj)", ["self_attn.q_proj", "mlp.up_proj"], "all-linear", None):
        edit_config(folder, target_modules=targets, layers_to_transform=None)
        assert adapters.load_adapter(llama(), folder).notes == ()
    edit_config(folder, target_modules=["q_proj", "up_proj", "query_key_value"], layers_to_transform=[0, 1])
    (note,) = adapters.load_adapter(llama(), folder).notes
    assert note == "The adapter targets query_key_value, which this model does not have."


def test_starting_from_a_folder(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({B: torch.ones(64, 2)}))
    model = llama()
    adapters.attach(model, ADAPTER.model_copy(update={"path": str(folder)}), seed=1)
    module = adapters.lora_modules(model)["model.layers.0.self_attn.q_proj"]
    assert torch.equal(module.lora_b, torch.ones(64, 2)) and module.lora_b.requires_grad


@pytest.mark.parametrize(
    "settings, fragment",
    [
        ({"rank": 4}, "rank 2 and scale 2, but the config asks for rank 4"),
        ({"alpha": 1.0}, "the config asks for rank 2 and scale 0.5"),
        ({"target_modules": ("q_proj",)}, "other modules"),
        ({"target_modules": ("q_proj", "up_proj", "v_proj")}, "other modules"),
    ],
)
def test_starting_from_a_folder_of_another_shape(folder: Path, settings: dict[str, Any], fragment: str) -> None:
    with pytest.raises(AdapterError, match=fragment):
        adapters.attach(llama(), ADAPTER.model_copy(update={"path": str(folder), **settings}), seed=1)


def test_starting_from_trained_modules_that_would_be_frozen_is_refused(tmp_path: Path) -> None:
    adapter = ADAPTER.model_copy(update={"trainable_modules": ("embed_tokens",)})
    model = llama()
    adapters.attach(model, adapter, seed=0)
    adapters.save_adapter(model, tmp_path, adapter, "base")
    with pytest.raises(AdapterError, match=r"trained weights of model\.embed_tokens, which would stay frozen"):
        adapters.attach(llama(), ADAPTER.model_copy(update={"path": str(tmp_path)}), seed=0)
    again = llama()
    adapters.attach(again, adapter.model_copy(update={"path": str(tmp_path)}), seed=0)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_saving_over_an_adapter_leaves_no_other_file(folder: Path) -> None:
    model = llama()
    adapters.load_adapter(model, folder)
    adapters.save_adapter(model, folder, ADAPTER, "base")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("trains", [True, False])
def test_a_model_without_adapter_cannot_be_saved(tmp_path: Path, trains: bool) -> None:
    with pytest.raises(AdapterError):
        adapters.save_adapter(llama().requires_grad_(trains), tmp_path, ADAPTER, "base")
