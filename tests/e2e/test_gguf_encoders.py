"""Encoders and encoder-decoders, from a quantized GGUF file through training to files that llama.cpp computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ingle import flow, inference
from ingle.config import load_run
from ingle.config.model import ModelConfig
from ingle.errors import ExportError
from ingle.export import export, quantize
from ingle.models import load_tokenizer
from ingle.prediction import open_predictor
from tests import tiny_tokenizers
from tests.numerics.test_gguf_encoders import T5_SIZES, bert, opened, pair_logits, publish, run_batch, unigram

CONFIG = """\
model: {id: MODEL, dtype: float32}
adapter: {kind: lora, rank: 4}
data: {sources: [DATA], max_seq_len: 32}
objective: {kind: KIND}
optim: {lr: 1e-2, schedule: constant}
train: {num_steps: 4, global_batch_size: 8, micro_batch_size: 4, save_every: null}
"""


def train(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    """Trains on the q8_0 file of the published model."""
    file, run, texts = folder / "model.gguf", folder / "run", folder / "train.jsonl"
    quantize(str(folder / "published"), "q8_0", file)
    before = file.read_bytes()
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.replace("MODEL", str(file)).replace("DATA", str(texts)).replace("KIND", kind)
    (folder / "run.yaml").write_text(text)
    report = flow.finetune(load_run(folder / "run.yaml", [f"--output={run}"]).run)
    assert {row["format"] for row in report.audit["classes"] if row["quantized"]} == {"q8_0"}
    assert file.read_bytes() == before
    return run


def test_a_classifier_trains_on_its_file_and_is_served(tmp_path: Path, llama_cpp: Any) -> None:
    bert(tmp_path / "published", tiny_tokenizers.bert())
    rows = [{"text": f"{word} house {n}", "label": word} for n in range(20) for word in ("great", "dull")]
    run = train(tmp_path, "classify", rows)
    with pytest.raises(ExportError, match="adapter in GGUF"):
        export(str(run), "gguf-adapter", tmp_path / "adapter.gguf")
    made = export(str(run), "gguf", tmp_path / "exported" / "model.gguf", type="f32")
    predictors = [open_predictor(str(path)) for path in (run, made.path)]
    trained, again = (
        next(each.predict([each.make_row({"text": "a great film"}, "row 1")]))["probabilities"] for each in predictors
    )
    assert again == pytest.approx(trained, abs=5e-3)  # in bfloat16 where it is fast
    ids = load_tokenizer(ModelConfig(id=str(made.path)))("a great film")["input_ids"]
    with opened(llama_cpp, made.path, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_RANK) as engine:
        run_batch(llama_cpp, llama_cpp.llama_decode, engine, ids)
        theirs = llama_cpp.llama_get_embeddings_seq(engine.ctx, 0)[:2]
    served = torch.tensor(theirs).softmax(-1).tolist()
    assert dict(zip(("dull", "great"), served, strict=True)) == pytest.approx(trained, abs=5e-3)


def test_an_encoder_decoder_trains_on_its_file_and_is_served(tmp_path: Path, llama_cpp: Any) -> None:
    tokenizer = unigram()
    config = T5Config(**T5_SIZES, vocab_size=len(tokenizer), decoder_start_token_id=0)
    publish(T5ForConditionalGeneration(config), tokenizer, tmp_path / "published")
    rows = [{"prompt": f"the quick brown fox {n}", "completion": "das Haus ist klein"} for n in range(20)]
    run = train(tmp_path, "seq2seq", rows)
    made = export(str(run), "gguf", tmp_path / "exported" / "model.gguf", type="f32")
    with pytest.raises(ExportError, match="only for causal models"):
        export(str(run), "gguf", tmp_path / "again" / "model.gguf", type="f32", verify=True)
    trained = inference.open_model(str(run))
    read = inference.open_model(str(made.path))
    prompt = "the quick brown fox"
    answers = [engine.generate([prompt], max_new_tokens=8)[0].token_ids for engine in (trained, read)]
    assert answers[0] == answers[1]
    source, answer = trained.tokenizer(prompt)["input_ids"], list(answers[0])
    with opened(llama_cpp, made.path, logits_all=True) as engine:
        theirs = pair_logits(llama_cpp, engine, source, [0, *answer[:-1]])
    assert answer and theirs.argmax(-1).tolist() == answer
