"""Runs with a task head against their baselines: the comparison, the report, and what evaluates and predicts again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from ingle import flow, prediction, scoring
from ingle.config import load_run
from ingle.errors import EvaluationError
from ingle.report.results import RunReport
from tests.conftest import make_tokenizer

WORDS = {"yes": "hello world", "no": "the quick brown fox"}
CONFIG = """\
model: {id: MODEL, dtype: float32}
adapter: {kind: lora, rank: 4}
data: {sources: [FOLDER/train.jsonl], max_seq_len: 32, validation: 0.2}
objective: classify
optim: {lr: 2e-2, schedule: constant}
train: {num_steps: 12, global_batch_size: 8, micro_batch_size: 4, save_every: 0}
evaluate: {sources: [FOLDER/test.jsonl], every: 6, num_validation_samples: 8}
output: FOLDER/run
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contains a tiny decoder, texts of two classes, of which one is more frequent, and a config."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, numbers in (("train", range(40)), ("test", range(40, 60))):
        labels = [label for number in numbers for label in (("yes", "no") if number % 2 else ("no",))]
        rows = [{"text": f"{WORDS[label]} {name} {i}", "label": label} for i, label in enumerate(labels)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.replace("MODEL", str(folder / "model")).replace("FOLDER", str(folder))
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> RunReport:
    return flow.finetune(load_run(folder / "config.yaml", []).run)


def test_a_classifier_is_compared_with_the_majority_and_with_its_base(report: RunReport, folder: Path) -> None:
    assert set(report.comparisons or ()) == {"majority", "zero-shot"}
    assert list(report.metrics) == ["accuracy", "f1_macro", "matthews", "log_loss"]
    assert report.comparisons is not None
    majority = report.comparisons["majority"].metrics["accuracy"]
    assert majority.base == pytest.approx(2 / 3)
    assert majority.tuned == 1.0 and majority.outcome == "better"
    assert report.outcome == "better"
    assert report.classes is not None
    assert report.classes.confusion == ((20, 0), (0, 10))
    assert [(row.name, row.support) for row in report.classes.rows] == [("no", 20), ("yes", 10)]
    assert report.validation is not None
    assert {"accuracy", "log_loss"} <= report.validation.history[-1].metrics.keys()
    page = (folder / "run" / "report.html").read_text()
    assert "What is taken for what" in page and "zero-shot" in page.lower()


def test_a_run_is_evaluated_and_predicts_as_when_it_was_trained(report: RunReport, folder: Path) -> None:
    run = folder / "run"
    task = load_run(folder / "config.yaml", []).run.task
    assert task is not None
    (again,) = scoring.evaluate(str(run), [task])
    assert again.metrics.keys() == report.metrics.keys()
    assert again.metrics["log_loss"].tuned == pytest.approx(report.metrics["log_loss"].tuned, rel=1e-4)
    predictor = prediction.open_predictor(str(run))
    records = list(predictor.predict(predictor.read(folder / "test.jsonl")))
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [record["label"] for record in records] == [answer["tuned"] for answer in answers]


def test_an_unknown_label_of_the_task_is_an_error_before_the_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "hello", "label": "yess"}\n')
    words = [f"--evaluate.sources=[{tmp_path}/test.jsonl]", f"--output={tmp_path}/run"]
    with pytest.raises(EvaluationError, match="'yess' of a held-out row is unknown") as error:
        flow.finetune(load_run(folder / "config.yaml", words).run)
    assert "did you mean 'yes'?" in str(error.value)
    assert not (tmp_path / "run").exists()
