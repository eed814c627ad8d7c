"""Models of every family, from a quantized GGUF file through training to exports that llama.cpp answers with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    PretrainedConfig,
)

from ingle import flow
from ingle.config import load_run
from ingle.export import Target, export, quantize
from ingle.gguf import read_gguf
from ingle.quant.format import PLAIN
from tests.contract.models.test_wrappers import _TEXT, _VISION, WRAPPERS, publish
from tests.e2e.conftest import write_config
from tests.numerics.test_gguf_families import CASES, EMBER, LONGROPE

#: Of layers that any type fits.
WIDE = {"hidden_size": 256, "num_hidden_layers": 4}
_INNER = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size")
_SIZES = {
    "mamba2": {"head_dim": 64, "num_heads": 8},
    "gemma4": {"num_hidden_layers": 6},
    "gemma4_moe": {"num_hidden_layers": 6},
    "phi3": {
        "rope_parameters": LONGROPE["rope_parameters"]
        | {"short_factor": [1.0 + n / 8 for n in range(24)], "long_factor": [1.0 + n for n in range(24)]}
    },
    "nemotron": {"head_dim": 64},
    "granitehybrid": {"mamba_n_heads": 8, "mamba_d_head": 64},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 64},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512},
}
MULTIMODAL = ["gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava"]
OPTIONS = ["--evaluate=null", "--train.num_steps=2", "--train.save_every=null", "--base.format=none"]


def random_folder(case: str, folder: Path) -> Path:
    """A random model whose routers decide clearly, because llama.cpp rounds the inputs of quantized layers."""
    model_type, settings = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(EMBER)
    sizes = dict.fromkeys(set(_INNER) & set(settings), 256) | WIDE | _SIZES.get(case, {})
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(model_type, **settings | sizes | ids)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The sigmoid of GLM-4.5 is 1 for several experts if it is larger; Gemma 4 divides by the root of hidden_size.
    clear = {"glm4_moe": 0.1, "gemma4_moe": 16.0}.get(case, 1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                is_router = name.endswith(("mlp.gate.weight", "router.weight", "router.proj.weight", "layer.weight"))
                parameter.normal_(std=clear if is_router else 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def require_served(run: Path, to: Target) -> None:
    """Exports plain numbers, with which llama.cpp must compute the same; it rounds the inputs of quantized layers."""
    made = export(str(run), to, run / to / "model.gguf", type="f32", verify=True, allow_loss=True).certificate
    assert made is not None and made.passed and made.agreement.mean_kl < 1e-3


def all_cases(quick: str) -> list[Any]:
    return [case if case == quick else pytest.param(case, marks=pytest.mark.sweep) for case in CASES]


@pytest.mark.parametrize("type_name", ["q4_k_m", pytest.param("q8_0", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("case", all_cases("lfm2"))
def test_a_family_trains_on_the_bytes_of_its_file(
    case: str, type_name: str, tiny_data: Path, tmp_path: Path, llama_cpp: Any
) -> None:
    folder, file = random_folder(case, tmp_path / "published"), tmp_path / "model.gguf"
    quantize(str(folder), type_name, file)
    before = file.read_bytes()
    run = load_run(write_config(tmp_path, file, tiny_data), OPTIONS).run
    report = flow.finetune(run)
    assert file.read_bytes() == before
    held = {each for row in report.audit["classes"] if row["quantized"] for each in row["format"].split("+")}
    stored = {tensor.type_name for tensor in read_gguf(file).tensors.values()} - set(PLAIN)
    assert held and held <= stored
    assert flow.plan(run).memory["weights"] > 0
    require_served(tmp_path / "run", "gguf")


@pytest.mark.parametrize("case", all_cases("qwen3_next"))
def test_the_adapter_of_a_family_is_served(case: str, tiny_data: Path, tmp_path: Path, llama_cpp: Any) -> None:
    folder = random_folder(case, tmp_path / "published")
    flow.finetune(load_run(write_config(tmp_path, folder, tiny_data), OPTIONS).run)
    require_served(tmp_path / "run", "gguf-adapter")


def gemma3() -> PretrainedConfig:
    """With the windows and the scale that llama.cpp derives from the number of layers."""
    text = _TEXT | {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=300)


@pytest.fixture(params=[pytest.param(kind, marks=() if kind == "gemma3" else pytest.mark.sweep) for kind in MULTIMODAL])
def multimodal(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setitem(WRAPPERS, "gemma3", gemma3)
    return publish(request.param, tmp_path / "published", AutoTokenizer.from_pretrained(tiny_model))


def test_the_text_part_of_a_multimodal_model_is_served(
    multimodal: Path, tiny_data: Path, tmp_path: Path, llama_cpp: Any
) -> None:
    flow.finetune(load_run(write_config(tmp_path, multimodal, tiny_data), OPTIONS).run)
    require_served(tmp_path / "run", "gguf")
    require_served(tmp_path / "run", "gguf-adapter")


@pytest.mark.sweep
def test_the_text_part_of_a_multimodal_model_trains_on_its_file(
    multimodal: Path, tiny_data: Path, tmp_path: Path, llama_cpp: Any
) -> None:
    quantize(str(multimodal), "q8_0", tmp_path / "model.gguf")
    flow.finetune(load_run(write_config(tmp_path, tmp_path / "model.gguf", tiny_data), OPTIONS).run)
    require_served(tmp_path / "run", "gguf")
