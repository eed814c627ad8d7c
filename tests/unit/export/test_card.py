"""The model card of an export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from ingle.config import load_run
from ingle.config.run import Run
from ingle.evaluation.divergence import Divergence
from ingle.export.card import make_card, read_licence


def _card(run: Run | None = None, folder: Path | None = None, licence: str | None = None) -> str:
    divergence = Divergence(
        kl=0.0125, top1_agreement=0.987, perplexity_first=3.5, perplexity_second=3.6, num_tokens=4096
    )
    return make_card(
        to="gguf",
        type_name="q4_k_m",
        base_model="some/base",
        licence=licence,
        run=run,
        run_folder=folder,
        usage="Serve it.",
        fidelity=(),
        divergence=divergence,
    )


def test_it_names_the_data_by_its_bytes_and_the_scores(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a"}\n')
    run = load_run(None, ["--model.id=some/base", f"--data.sources={data}", f"--output={tmp_path / 'run'}"]).run
    row = {"base": 10.0, "tuned": 60.5, "delta": 50.5, "ci95": [48.0, 53.0], "n": 150}
    report = {"metrics": {"chrf": row}, "verdict": "Better."}
    state = tmp_path / "run" / "checkpoints" / "step-4"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"data_hash": "abc123"}))
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    card = _card(run, tmp_path / "run", "apache-2.0")
    assert f"| train.jsonl | `{hashlib.sha256(data.read_bytes()).hexdigest()}` |" in card
    assert "`abc123`" in card and "| chrf | 10" in card and "| 48 to 53 | 150 |" in card and "Better." in card
    assert "0.0125 nats" in card and "98.7%" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["model"]["id"] == "some/base"


def test_an_unknown_licence_is_said_to_be_the_bases(tmp_path: Path) -> None:
    card = _card()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert "the licence of the base model applies" in card and "## Data" not in card
    (tmp_path / "README.md").write_text(_card(licence="mit"))
    assert read_licence(tmp_path) == "mit"
