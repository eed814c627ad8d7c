"""Runs of encoder-decoders: training, resuming, the comparison, and what transformers and PEFT read afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from ingle import flow, inference, scoring
from ingle.cli.training import next_steps
from ingle.config import load_run
from ingle.events import Event, Saved, Step
from ingle.export import export
from ingle.report.results import RunReport
from tests.tiny_tokenizers import roberta, t5

WORDS = ("the quick brown fox", "the lazy dog", "John Smith", "the house", "New York", "das Haus", "a dull film")
CONFIG = """\
model: {id: MODEL, dtype: float32}
adapter: {kind: lora, rank: 4, dropout: 0.1}
data: {sources: [FOLDER/train.jsonl], max_seq_len: 64, validation: 0.2}
objective: {kind: seq2seq, prefix: "translate: "}
optim: {lr: 1e-2, schedule: constant}
train: {num_steps: 6, global_batch_size: 8, micro_batch_size: 4, save_every: 3, keep_checkpoints: 3}
evaluate: {sources: [FOLDER/test.jsonl], every: 3, num_validation_samples: 8, max_new_tokens: 8}
output: FOLDER/run
"""


class _Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contains a tiny T5, a tiny BART, and pairs of texts of different lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    tokenizers = {"t5": t5(), "bart": roberta()}
    tokenizers["t5"].add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(10)]})
    built = {
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=len(tokenizers["t5"]), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        "bart": transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=len(tokenizers["bart"]), d_model=32, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
                max_position_embeddings=64,
            )
        ),
    }  # fmt: skip
    for name, model in built.items():
        model.save_pretrained(folder / name)
        tokenizers[name].save_pretrained(folder / name)
    for name, numbers in (("train", range(40)), ("test", range(40, 52))):
        texts = [" ".join(WORDS[(number * step) % 7] for step in range(1, 2 + number % 3)) for number in numbers]
        rows = [
            {"source": f"{number} {text}", "target": text.upper()} for number, text in zip(numbers, texts, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> Callable[..., tuple[RunReport, list[float]]]:
    """Trains and returns the report and the losses; ``stop_at`` is a step whose checkpoint is the last thing done."""

    def run(model: str, name: str, *flags: str, stop_at: int | None = None) -> tuple[RunReport, list[float]]:
        path = folder / f"{model}.yaml"
        path.write_text(CONFIG.replace("MODEL", str(folder / model)).replace("FOLDER", str(folder)))
        losses: list[float] = []

        def sink(event: Event) -> None:
            if isinstance(event, Step):
                losses.append(event.loss)
            if isinstance(event, Saved) and event.step == stop_at:
                raise _Stopped

        return flow.finetune(load_run(path, [f"--output={folder / name}", *flags]).run, sink), losses

    return run


def test_an_adapter_over_a_quantized_base(train: Callable[..., tuple[RunReport, list[float]]], folder: Path) -> None:
    report, losses = train("t5", "lora", "--base.format=nf4")
    assert losses[-1] < losses[0]
    assert report.validation is not None and len(report.validation.history) == 3
    assert {"chrf", "rouge_l"} & report.metrics.keys()
    with pytest.raises(_Stopped):
        train("t5", "stopped", "--base.format=nf4", stop_at=3)
    train("t5", "stopped", "--base.format=nf4")
    whole, stopped = ((folder / name / "adapter" / "adapter_model.safetensors") for name in ("lora", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    task = load_run(folder / "t5.yaml", []).run.task
    assert task is not None
    (again,) = scoring.evaluate(str(folder / "lora"), [task])
    assert {name: metric.tuned for name, metric in again.metrics.items()} == {
        name: metric.tuned for name, metric in report.metrics.items()
    }
    answers = [json.loads(line) for line in (folder / "lora" / "answers.jsonl").read_text().splitlines()]
    generated = inference.open_model(str(folder / "lora")).generate(
        [row["prompt"] for row in answers], max_new_tokens=8
    )
    assert [each.text for each in generated] == [row["tuned"] for row in answers]
    assert [purpose for purpose, _ in next_steps(folder / "lora")] == ["report", "generate", "export"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("model", ["t5", "bart"])
def test_transformers_and_peft_compute_the_same_likelihoods(
    train: Callable[..., tuple[RunReport, list[float]]], folder: Path, model: str
) -> None:
    report, _ = train(model, f"{model}-likelihood", "--evaluate.metrics=[perplexity]")
    export(str(folder / f"{model}-likelihood"), "safetensors", folder / f"{model}-merged", type="f32")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / model)
    readers = {
        "merged": transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / f"{model}-merged"),
        "adapter": peft.PeftModel.from_pretrained(base, str(folder / f"{model}-likelihood" / "adapter")),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / model)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for reader in readers.values():
        nats = count = 0.0
        for row in rows:
            labels = tokenizer(row["target"], return_tensors="pt").input_ids
            inputs = tokenizer("translate: " + row["source"], return_tensors="pt")
            with torch.no_grad():
                logits = reader.eval()(input_ids=inputs.input_ids, labels=labels).logits[0]
            nats += float(cross_entropy(logits, labels[0], reduction="sum"))
            count += labels.shape[1]
        assert report.metrics["perplexity"].tuned == pytest.approx(float(torch.tensor(nats / count).exp()), rel=1e-4)


@pytest.mark.parametrize(("model", "style"), [("t5", "t5"), ("bart", "bart")])
def test_texts_are_restored(
    train: Callable[..., tuple[RunReport, list[float]]], folder: Path, model: str, style: str
) -> None:
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        texts = "".join(json.dumps({"text": f"{row['source']} {row['target']}"}) + "\n" for row in rows)
        (folder / f"{name}-texts.jsonl").write_text(texts)
    flags = [f"--data.sources=[{folder}/train-texts.jsonl]", f"--evaluate.sources=[{folder}/test-texts.jsonl]"]
    span = f"--objective={{kind: span, style: {style}}}"
    report, losses = train(model, f"{model}-span", span, "--adapter=none", "--optim.lr=3e-3", *flags)
    assert losses[-1] < losses[0]
    assert report.metrics["perplexity"].outcome == "better"
