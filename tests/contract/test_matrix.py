"""Formats x adapters x objectives: each combination trains two steps and can be opened again, or refuses in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ingle import adapters, assembly, flow, inference
from ingle.config import load_run
from ingle.config.base import FormatName
from ingle.errors import ConfigError
from ingle.events import Event, Step
from tests.conftest import make_tokenizer

ADAPTERS = {
    "none": ["--adapter.kind=none"],
    "lora": ["--adapter.rank=2"],
    "merge-aware": ["--adapter.rank=2", "--adapter.merge_aware.fraction=0.5"],
    "qa_lora": ["--adapter.kind=qa_lora", "--adapter.rank=2"],
    "qa_lora-rounded": ["--adapter.kind=qa_lora", "--adapter.rank=2", "--adapter.train_rounding"],
}
#: Besides supervised fine-tuning, which every format is tried with.
OBJECTIVES = ("clm",)
FOLDING = {"q4_1", "q5_1", "hqq"}
#: Formats of downloaded files, which nothing is packed in.
ONLY_READ = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "mxfp4", "nvfp4"}


def refusal(format: str, adapter: str) -> str | None:
    """What a combination is refused with; None where it trains."""
    if format in ONLY_READ:
        return "cannot be quantized to"
    if adapter == "none":
        return None if format == "none" else "Full fine-tuning needs unquantized weights"
    if adapter.startswith("qa_lora"):
        return None if format in FOLDING else "free offset"
    if adapter == "merge-aware":
        return "needs the format" if format == "none" else None
    return None


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks in every format, and something to learn."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    turns = [("user", "hello world?"), ("assistant", "the quick brown fox jumps")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clm.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 4)
    return folder


def train(material: Path, output: Path, format: str, adapter: str, objective: str) -> list[float]:
    """The losses of two steps; what is wrong with the combination is raised."""
    flags = [
        f"--model.id={material}/model",
        "--model.dtype=float32",
        f"--base.format={format}",
        *ADAPTERS[adapter],
        f"--objective.kind={objective}",
        f"--data.sources={material}/{objective}.jsonl",
        "--data.max_seq_len=64",
        "--train.num_steps=2",
        "--train.global_batch_size=2",
        "--train.save_every=0",
        "--optim.lr=1e-2",
        "--optim.warmup_steps=0",
        f"--output={output}",
    ]
    losses = []

    def sink(event: Event) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    flow.finetune(load_run(None, flags).run, sink)
    return losses


def check(material: Path, output: Path, format: str, adapter: str, objective: str) -> None:
    said = refusal(format, adapter)
    if said is not None:
        with pytest.raises(ConfigError, match=said) as caught:
            train(material, output, format, adapter, objective)
        assert " fix " in str(caught.value)
        assert not output.exists()
        return
    losses = train(material, output, format, adapter, objective)
    assert len(losses) == 2 and 0 < losses[1] < 20
    engine: Any = inference.open_model(str(output))
    with torch.no_grad():
        assert bool(engine.model(torch.arange(8)[None]).logits.isfinite().all())
    if adapter == "none":
        return
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for tensor in tensors.values())
    layers = adapters.lora_modules(engine.model).values()
    assert len(tensors) == 2 * len(layers) == 14
    assert all((layer.merged is not None) == (adapter in ("merge-aware", "qa_lora-rounded")) for layer in layers)


#: Where LoRA without merge-awareness is tried each time; elsewhere merge-aware training goes the same way and further.
PLAINLY_TRIED = {"none", "nf4", "q4_k", "hqq"}


def pairs() -> list[Any]:
    """Every format with every adapter; combinations that teach nothing new only in the sweep."""
    found = []
    for format in get_args(FormatName):
        for adapter in ADAPTERS:
            repeats = adapter == "lora" and refusal(format, adapter) is None and format not in PLAINLY_TRIED
            found.append(pytest.param(format, adapter, marks=[pytest.mark.sweep] if repeats else []))
    return found


@pytest.mark.parametrize(("format", "adapter"), pairs())
def test_formats_and_adapters(material: Path, tmp_path: Path, format: str, adapter: str) -> None:
    check(material, tmp_path / "run", format, adapter, "sft")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("format", ["none", "q5_1"])
def test_adapters_and_objectives(material: Path, tmp_path: Path, format: str, adapter: str, objective: str) -> None:
    check(material, tmp_path / "run", format, adapter, objective)


@pytest.mark.parametrize("target", [name for name in get_args(FormatName) if name != "none"])
def test_formats_to_merge_into(material: Path, tmp_path: Path, target: str) -> None:
    """From NF4 into every format; what cannot be packed is refused before the first step."""
    flags = [
        f"--model.id={material}/model",
        "--base=nf4",
        f"--adapter.merge_aware.format={target}",
        f"--data.sources={material}/sft.jsonl",
        "--output=o",
    ]
    if target in ONLY_READ:
        with pytest.raises(ConfigError, match="cannot be packed"):
            load_run(None, flags)
        return
    parts = assembly.assemble(load_run(None, flags).run, lambda event: None)
    parts.rounding.prepare(parts.plan.num_steps)
    layers = adapters.lora_modules(parts.model).values()
    assert all(layer.merged is not None for layer in layers)
    with torch.no_grad():
        assert bool(parts.model(torch.arange(8)[None]).logits.isfinite().all())
