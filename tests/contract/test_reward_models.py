"""Reward models after training: they are evaluated next to a rule that reads lengths alone, and they score answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from ingle import prediction, scoring
from ingle.assembly import assemble
from ingle.config.evaluate import TaskConfig
from ingle.config.run import Run
from ingle.evaluation.run.reward_source import LengthSource
from ingle.evaluation.tasks.samples import read_task
from ingle.flow import finetune
from ingle.report.results import Comparison
from tests.axis import Point, config_of

#: The rejected answers of the data are longer in most rows.
ANSWERS = {"prompt": "the fox", "chosen": "a lazy dog jumps over", "rejected": "a dog"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, trained for a few steps."""
    folder = tmp_path_factory.mktemp("reward")
    config = config_of(folder, Point("llama", "packed", {"kind": "reward"}))
    config["evaluate"] = {"sources": [{"path": str(folder / "reward.jsonl")}]}
    finetune(Run.model_validate(config))
    return folder / "run"


def test_its_accuracy_stands_next_to_that_of_lengths(run: Path) -> None:
    rows = run.parent / "reward.jsonl"
    (found,) = scoring.evaluate(str(run), [TaskConfig.model_validate({"sources": [{"path": str(rows)}]})])
    assert isinstance(found, Comparison)
    metric = found.metrics["accuracy"]
    report = json.loads((run / "report.json").read_text())["metrics"]["accuracy"]
    assert [metric.base, metric.tuned] == [report["base"], report["tuned"]] and metric.n == 30
    records = list(prediction.open_predictor(str(run)).predict(prediction.open_predictor(str(run)).read(rows)))
    assert metric.tuned == sum(record["margin"] > 0 for record in records) / 30
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs) / 30
    shorter = sum(len(pair["chosen"]) < len(pair["rejected"]) for pair in pairs) / 30
    assert metric.base == max(longer, shorter) != 0.5


def test_its_head_begins_small_unless_the_checkpoint_has_one(tmp_path: Path) -> None:
    """Of standard deviation 1 / sqrt(H + 1), which is not the 0.02 of transformers."""
    config = config_of(tmp_path, Point("llama", "packed", {"kind": "reward"}))
    found = assemble(Run.model_validate(config), print)
    weight = found.model.score.weight.detach()
    assert weight.shape[0] == 1
    assert float(weight.std()) == pytest.approx((weight.shape[1] + 1) ** -0.5, rel=0.3)
    checkpoint = tmp_path / "scores"
    model = LlamaForSequenceClassification.from_pretrained(config["model"]["id"], num_labels=1)
    model.score.weight.data.fill_(0.5)
    model.save_pretrained(checkpoint)
    found.tokenizer.save_pretrained(checkpoint)
    config["model"] |= {"id": str(checkpoint)}
    kept = assemble(Run.model_validate(config), print).model.score.weight
    assert torch.equal(kept, torch.full_like(kept, 0.5))


def test_a_head_whose_bias_cancels_is_trained(tmp_path: Path) -> None:
    """The scores of a pair differ by no bias, so no gradient moves that of a BERT's head."""
    config = config_of(tmp_path, Point("bert", "packed", {"kind": "reward"}))
    config["train"] |= {"num_steps": 2, "save_every": 0}
    finetune(Run.model_validate(config))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "rewards/chosen", "rewards/margin"} <= row.keys() for row in rows if "loss" in row)
    assert not any("reward" in row for row in rows)  # the name of what sampled answers earn


def test_it_scores_one_answer_several_answers_and_conversations(run: Path, tmp_path: Path) -> None:
    predictor = prediction.open_predictor(str(run))
    (pair,) = predictor.predict(predictor.read(write(tmp_path / "pairs.jsonl", [ANSWERS])))
    alone = []
    for name in ("chosen", "rejected"):
        row = predictor.make_row({"text": ANSWERS["prompt"], "pair": ANSWERS[name]}, "--text")
        alone += [record["value"] for record in predictor.predict([row])]
        turns = [{"role": "user", "content": ANSWERS["prompt"]}, {"role": "assistant", "content": ANSWERS[name]}]
        (said,) = predictor.predict(predictor.read(write(tmp_path / f"{name}.jsonl", [{"messages": turns}])))
        assert said["value"] == pytest.approx(alone[-1], abs=1e-5)
    assert list(pair["scores"].values()) == pytest.approx(alone, abs=1e-5) and alone[0] != alone[1]
    assert pair["margin"] == pytest.approx(alone[0] - alone[1], abs=1e-5)


def test_lists_of_scored_answers_compare_the_best_and_the_worst(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completions": ["aa", "a", "aaa"], "scores": [0.5, 0.9, 0.1]}]
    task = TaskConfig.model_validate({"sources": [{"path": str(write(tmp_path / "ranked.jsonl", rows))}]})
    (sample,) = read_task(task.model_copy(update={"metrics": ("accuracy",)}), "reward")
    assert [text.completion for text in sample.example.texts.values()] == ["a", "aaa"]
    found = [next(iter(LengthSource(longer).predictions([sample], task, print))).labels for longer in (True, False)]
    assert found == [("rejected",), ("chosen",)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
