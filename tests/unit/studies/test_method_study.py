"""``ingle methods`` on a tiny model: equal rows and steps, refusals as rows, paired differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingle.config.run import Run
from ingle.errors import CheckpointError, ConfigError
from ingle.report.study_pages import render_study_page, study_tables
from ingle.studies import MethodRequest, study_methods
from ingle.studies.methods import methods_of
from tests.axis import POINTS, config_of


def _request(folder: Path, options: dict[str, Any] | None = None, **study: Any) -> MethodRequest:
    config = config_of(folder, POINTS["sft, dealt attention" if study.pop("bloom", False) else "clm, packed"])
    run = Run.model_validate(config | {"output": str(folder / "study")} | (options or {}))
    return MethodRequest(run, **{"steps": 3, "num_seeds": 1, "num_rates": 1, **study})


def test_methods_are_rows_and_refusals_have_reasons(tmp_path: Path) -> None:
    request = _request(tmp_path, {"base": {"format": "nf4"}}, names=("full", "lora", "ia3"))
    content = study_methods(request).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    full, lora, ia3 = content["methods"]
    assert "nf4 weights cannot be trained" in full["refused"]
    assert lora["refused"] is None
    assert "worse_by" not in lora
    assert ia3["worse_by"]["value"] == pytest.approx(ia3["score"]["value"] - lora["score"]["value"])
    assert ia3["parameters"] < lora["parameters"]
    assert ia3["front"]
    tables, lines = study_tables(content, "methods")
    assert [row["method"].split()[0] for row in tables[0][1]] == ["lora", "ia3"]
    assert any("full is not possible here" in line for line in lines)
    assert "<svg" in render_study_page(content, "methods")
    assert study_methods(request).trials.num_run == 0


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown method: lorra") as refused:
        study_methods(_request(tmp_path, names=("lorra",)))
    assert "bitfit" in str(refused.value.fix)


def test_a_full_disk_is_no_fault_of_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise CheckpointError("The disk is full.")

    monkeypatch.setattr("ingle.studies.trials.flow.finetune", fail)
    with pytest.raises(CheckpointError, match="The disk is full"):
        study_methods(_request(tmp_path, names=("lora", "ia3")))


def test_low_rank_methods_have_the_rank_of_the_config(tmp_path: Path) -> None:
    methods = methods_of(_request(tmp_path, {"adapter": {"kind": "lora", "rank": 3, "target_modules": ["q_proj"]}}).run)
    assert methods["dora"].sections[0]["rank"] == methods["lora"].sections[0]["rank"] == 3


@pytest.mark.sweep
def test_every_method_is_measured_on_a_task(tmp_path: Path) -> None:
    rows = tmp_path / "task.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"the fox {n}", "completion": "jumps over"}) + "\n" for n in range(6))
    )
    task = {"sources": [str(rows)], "metrics": ["chrf", "bits_per_byte"], "max_new_tokens": 4, "every": None}
    content = study_methods(_request(tmp_path, {"evaluate": task}, num_seeds=2)).to_dict()
    assert content["score"]["name"] == "chrf"
    assert content["score"]["higher_is_better"]
    assert {row["name"]: row["refused"] for row in content["methods"]} == {
        name: None for name in methods_of(_request(tmp_path).run)
    }
    for row in content["methods"]:
        assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"]
        assert set(row["metrics"]) == {"chrf", "bits_per_byte"}
        assert len(row["scores"]) == 2
