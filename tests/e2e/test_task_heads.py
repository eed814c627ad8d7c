"""Runs with a task head: training, resuming, and what transformers and PEFT read afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from ingle import flow
from ingle.config import load_run
from ingle.events import Event, Saved, Step
from ingle.export import export
from tests.conftest import make_tokenizer

WORDS = {"yes": "hello world", "no": "the quick brown fox"}
CONFIG = """\
model: {id: MODEL, dtype: float32}
adapter: {kind: lora, rank: 4, dropout: 0.1}
data: {sources: [train.jsonl], max_seq_len: 32}
objective: {kind: classify}
optim: {lr: 1e-2, schedule: constant}
train: {num_steps: 8, global_batch_size: 8, micro_batch_size: 4, save_every: 3, keep_checkpoints: 3}
output: run
"""


class _Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contains a tiny decoder, a tiny encoder, and texts of two classes."""
    folder = tmp_path_factory.mktemp("heads")
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    built = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**shape)),
    }
    for name, model in built.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"text": f"{WORDS[label]} {number}", "label": label} for number in range(40) for label in WORDS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> Callable[..., list[float]]:
    """Trains and returns the losses; ``stop_at`` is a step whose checkpoint is the last thing that is done."""

    def run(model: str, name: str, *flags: str, stop_at: int | None = None) -> list[float]:
        path = folder / f"{model}.yaml"
        path.write_text(CONFIG.replace("MODEL", str(folder / model)).replace("train.jsonl", f"{folder}/train.jsonl"))
        losses: list[float] = []

        def sink(event: Event) -> None:
            if isinstance(event, Step):
                losses.append(event.loss)
            if isinstance(event, Saved) and event.step == stop_at:
                raise _Stopped

        flow.finetune(load_run(path, [f"--output={folder / name}", *flags]).run, sink)
        return losses

    return run


@pytest.mark.parametrize(
    ("model", "flags"),
    [("llama", ("--base.format=nf4",)), ("bert", ("--adapter=none", "--optim.lr=3e-3"))],
    ids=["adapter on a decoder", "full encoder"],
)
def test_the_loss_falls_and_a_stopped_run_gives_the_same_bytes(
    train: Callable[..., list[float]], folder: Path, model: str, flags: tuple[str, ...]
) -> None:
    losses = train(model, f"{model}-whole", *flags)
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    with pytest.raises(_Stopped):
        train(model, f"{model}-stopped", *flags, stop_at=3)
    train(model, f"{model}-stopped", *flags)
    whole, stopped = (next((folder / f"{model}-{name}").glob("*/*model*.safetensors")) for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_a_frozen_encoder_gets_a_trained_head(train: Callable[..., list[float]], folder: Path) -> None:
    losses = train("bert", "frozen", "--adapter.target_modules=none")
    assert sum(losses[-2:]) < sum(losses[:2])
    saved = load_file(folder / "frozen" / "adapter" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in saved} == {
        f"{module}.{part}" for module in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_pipelines_read_the_adapter_and_the_merged_model(train: Callable[..., list[float]], folder: Path) -> None:
    train("bert", "lora")
    adapter = folder / "lora" / "adapter"
    assert json.loads((adapter / "labels.json").read_text()) == ["no", "yes"]
    export(str(folder / "lora"), "safetensors", folder / "merged", type="f32")
    head = transformers.AutoConfig.from_pretrained(adapter / "head")
    read: dict[str, Any] = {
        "merged": transformers.AutoModelForSequenceClassification.from_pretrained(folder / "merged"),
        "adapter": peft.AutoPeftModelForSequenceClassification.from_pretrained(
            str(adapter), id2label=head.id2label, label2id=head.label2id
        ),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    texts = [f"{text} 3" for text in WORDS.values()]
    scores = {}
    for name, model in read.items():
        classify = transformers.pipeline("text-classification", model=model.eval(), tokenizer=tokenizer)
        found = [classify(text, top_k=None) for text in texts]
        assert [rows[0]["label"] for rows in found] == list(WORDS)
        scores[name] = torch.tensor([[row["score"] for row in rows] for rows in found])
    torch.testing.assert_close(scores["merged"], scores["adapter"], rtol=1e-5, atol=1e-6)
