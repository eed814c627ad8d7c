"""The model card and the fidelity report of an export."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, Phi3Config

from ingle.config import load_run
from ingle.config.base import NoBase
from ingle.config.model import ModelConfig
from ingle.config.run import Run
from ingle.evaluation.run.divergence import Divergence
from ingle.export.fidelity.fidelity_report import FidelityReport
from ingle.export.fidelity.measurement import TensorFidelity
from ingle.export.job import ExportJob
from ingle.export.model_card import make_card, read_license
from ingle.export.model_export import explain_context
from ingle.export.request import ExportRequest
from ingle.inference import Source
from tests.stored_results import STORED

TENSOR = TensorFidelity(
    name="w",
    type="q4_k",
    num_weights=100,
    delta_rms=0.1,
    weight_rms=1.0,
    step=0.2,
    codes_changed=0.1,
    correlation=0.9704,
    gain=1.0,
    num_bytes=56,
)
REPORT = FidelityReport(
    type="q4_k_m",
    num_tensors=56,
    num_copied=14,
    tensors=(TENSOR,) * 42,
    divergence=Divergence(
        kl=0.0125, top1_agreement=0.987, perplexity_first=3.5, perplexity_second=3.6, num_tokens=4096
    ),
    adapter_effect=0.5,
    warnings=("Mind the gap.",),
)


def _correlated(correlation: float, **changes: Any) -> FidelityReport:
    return replace(REPORT, tensors=(replace(TENSOR, correlation=correlation),) * 42, **changes)


def _card(base: str, run: Run | None = None, folder: Path | None = None) -> str:
    source = Source(ModelConfig(id=base), NoBase())
    job = ExportJob(ExportRequest(to="gguf", out=Path("m.gguf")), source, None, lambda event: None, run, folder)
    return make_card(job, "q4_k_m", "Serve it.", REPORT, "m.fidelity.json")


def test_it_names_the_data_by_its_bytes_and_the_scores(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a"}\n')
    run = load_run(None, ["--model.id=some/base", f"--data.sources={data}", f"--output={tmp_path / 'run'}"]).run
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    state = tmp_path / "run" / "checkpoints" / "step-4"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"data_hash": "abc123"}))
    (tmp_path / "run" / "report.json").write_text(json.dumps(STORED["report"]))
    card = _card(str(tmp_path), run, tmp_path / "run")
    assert f"| train.jsonl | `{hashlib.sha256(data.read_bytes()).hexdigest()}` |" in card
    name, row = next(iter(STORED["report"]["metrics"].items()))
    low, high = row["ci95"]
    assert "`abc123`" in card and f"| {name} | {row['base']:.4g} | {row['tuned']:.4g} |" in card
    assert f"| {low:.4g} to {high:.4g} | {row['n']} |" in card and STORED["report"]["verdict"] in card
    assert "on 4,096 tokens: KL divergence 0.0125 nats" in card and "98.7 %" in card
    assert "56 tensors: 42 merged with the adapter, 14 copied byte for byte." in card
    assert "correlation 0.970" in card and "**Warning.** Mind the gap." in card and "`m.fidelity.json`" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["model"]["id"] == "some/base"


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"metrics": {"chrf": 1}}', '{"metrics": []}'])
def test_a_damaged_run_folder_costs_the_card_its_scores(tmp_path: Path, text: str) -> None:
    run = load_run(None, ["--model.id=some/base", "--data.sources=a.jsonl", f"--output={tmp_path}"]).run
    state = tmp_path / "checkpoints" / "step-4"
    state.mkdir(parents=True)
    for file in (tmp_path / "report.json", state / "state.json"):
        file.write_text(text)
    card = _card("some/base", run, tmp_path)
    assert "## Data" in card and "## Scores" not in card and "tokenized data" not in card


def test_without_a_licence_that_of_the_base_applies(tmp_path: Path) -> None:
    card = _card("some/base")
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert "the license of the base model applies" in card and "## Data" not in card
    for text in (card.replace("license: other", "license: [mit]"), "---\n{\n---\n", "No head."):
        (tmp_path / "README.md").write_text(text)
        assert read_license(tmp_path) is None


def _doubts(report: FidelityReport, *, rounded_in_training: bool = False) -> str:
    return " ".join(report.find_doubts("--to gguf-adapter", rounded_in_training=rounded_in_training))


def test_a_doubtful_export_is_explained() -> None:
    assert _doubts(REPORT) == ""
    assert REPORT.divergence is not None
    small = replace(REPORT.divergence, kl=0.002, num_tokens=17)
    doubts = _doubts(_correlated(0.498, divergence=small, adapter_effect=0.003))
    assert "on only 17 tokens" in doubts and "--data" in doubts
    assert "0.498 over 42 merged tensors" in doubts and "0.0020 nats per token (the limit is 0.15)" in doubts
    assert "training moved the base by only 0.0030, so most" in doubts
    # Nothing is wrong with the weights, but the loss is most of what was trained.
    assert "training had moved the base by 0.0150" in _doubts(replace(REPORT, adapter_effect=0.015))
    assert "--allow-loss" in _doubts(_correlated(0.1, divergence=None))
    assert "above 0.5; --data" in _doubts(_correlated(0.6, divergence=None))
    # Training used the rounding: a low correlation is what it was evaluated with.
    assert _doubts(_correlated(0.1), rounded_in_training=True) == ""


def test_as_trained_is_said_to_round_again() -> None:
    def rounds(**changes: Any) -> bool:
        return "rounded to that type again" in " ".join(replace(REPORT, **changes).describe_weights())

    assert not rounds()
    assert rounds(type="as-trained")
    assert not rounds(type="as-trained", tensors=())


def test_singulars() -> None:
    one = replace(REPORT, num_tensors=1, num_copied=0, tensors=(TENSOR,)).describe_weights()
    assert one[0] == "1 tensor: 1 merged with the adapter."
    assert "over 1 merged tensor (" in one[1]


def test_the_dump_has_the_keys_that_scripts_read() -> None:
    assert REPORT.to_dict() | {"tensors": []} == {
        "type": "q4_k_m",
        "num_tensors": 56,
        "num_copied": 14,
        "num_merged": 42,
        "mean_correlation": pytest.approx(0.9704),
        "divergence": {
            "kl": 0.0125, "top1_agreement": 0.987, "perplexity_first": 3.5, "perplexity_second": 3.6, "num_tokens": 4096
        },
        "adapter_effect": 0.5,
        "limits": {"max_kl": 0.15, "min_correlation_without_text": 0.5},
        "promotion": None,
        "tensors": [],
        "warnings": ["Mind the gap."],
    }  # fmt: skip
    assert REPORT.to_dict()["tensors"][0]["delta_per_step"] == pytest.approx(0.5)


def test_the_context_is_named_if_its_size_changes_the_answers() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    rope = {"rope_type": "longrope", "rope_theta": 1e4} | factors
    config = Phi3Config(original_max_position_embeddings=4100, rope_parameters=rope)
    # llama.cpp rounds the size up to a multiple of 256, and 4,352 is too large.
    assert "`-c 4096`" in explain_context(SimpleNamespace(config=config))
    assert explain_context(SimpleNamespace(config=LlamaConfig())) == ""
