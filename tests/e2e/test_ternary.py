"""Full training through ternary rounding, from the config to a folder that answers; stopped half-way and gone on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ingle import models
from ingle.config.base import NoBase, TernaryBase
from ingle.config.loader import load_run
from ingle.config.model import ModelConfig
from ingle.events import Event, Saved, Started
from ingle.flow import finetune, resume
from ingle.inference import open_model
from ingle.quant import TernaryLinear, convert

FLAGS = ["--adapter=none", "--base={format: ternary, train: true}", "--optim.lr=3e-3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("ternary")
    (folder / "config.yaml").write_text(f"""\
model: {{id: {tiny_model}, dtype: bfloat16}}
data: {{sources: [{tiny_data}/train.jsonl], max_seq_len: 64}}
train: {{num_steps: 12, global_batch_size: 4, micro_batch_size: 2, save_every: 3, keep_checkpoints: 4}}
evaluate:
  sources: [{tiny_data}/held-out.jsonl]
  metrics: [bits_per_byte]
  num_samples: 8
output: {folder}/run
""")
    events: list[Event] = []
    report = finetune(load_run(folder / "config.yaml", FLAGS).run, events.append)
    assert report.metrics["bits_per_byte"].delta < 0
    (started,) = (event for event in events if isinstance(event, Started))
    (row,) = (row for row in started.audit["classes"] if row["class_name"] == "TernaryLinear")
    assert row["modules"] == 2 * 7
    assert row["trainable"] == row["parameters"]
    assert [event.kind for event in events if isinstance(event, Saved)][-2:] == ["model", "report"]
    return folder / "run"


def test_what_is_saved_is_ternary(trained: Path) -> None:
    weights = load_file(trained / "model" / "model.safetensors")
    mapped = [weight for name, weight in weights.items() if name.endswith("_proj.weight")]
    assert len(mapped) == 14
    for weight in mapped:
        scale = weight.abs().max()
        assert set((weight.float() / scale.float()).unique().tolist()) == {-1.0, 0.0, 1.0}
        assert scale.half().float() == scale.float()  # GGUF's ternary types have float16 scales
    assert len(weights["model.embed_tokens.weight"].abs().unique()) > 1000


def test_the_folder_answers_as_the_trained_model_did(trained: Path, tiny_model: Path) -> None:
    opened = open_model(str(trained)).model
    assert not any(isinstance(module, TernaryLinear) for module in opened.modules())
    model = models.load_model(ModelConfig(id=str(tiny_model), dtype="bfloat16"), NoBase())
    convert(model, TernaryBase(format="ternary", train=True))
    masters = load_file(trained / "checkpoints" / "step-12" / "optimizer.safetensors")
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[f"master.{name}"])
        assert torch.equal(opened(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_run_that_was_stopped_ends_in_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    expected = (again / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(again / "model")
    for name in ("report.json", "checkpoints/step-12", "checkpoints/step-9"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume(again)
    assert (again / "model" / "model.safetensors").read_bytes() == expected


def test_masters_stay_in_the_checkpoint(trained: Path) -> None:
    state = load_file(trained / "checkpoints" / "step-12" / "optimizer.safetensors")
    master = state["master.model.layers.0.mlp.up_proj.weight"]
    assert master.dtype == torch.float32
    assert len(master.abs().unique()) > 1000
