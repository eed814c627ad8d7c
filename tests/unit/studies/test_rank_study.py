"""``ingle rank`` on a tiny model: its trials are runs, and a repeated study measures nothing again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingle import flow
from ingle.config.run import Run
from ingle.errors import ConfigError
from ingle.events import Event, Progress, Warned
from ingle.report.study_pages import render_study_page
from ingle.studies import RankRequest, study_rank
from tests.axis import POINTS, config_of


def _request(folder: Path, **options: Any) -> RankRequest:
    config = config_of(folder, POINTS["clm, packed"]) | {"output": str(folder / "study")}
    config["data"] |= {"validation": {"sources": config["data"]["sources"]}}  # what the tiny model can learn in 3 steps
    return RankRequest(Run.model_validate(config), steps=3, **options)


def test_a_study_that_is_stopped_continues_with_what_is_missing(tmp_path: Path) -> None:
    request = _request(tmp_path, ranks=(2,), dims=(4,), num_seeds=1, num_rates=1)
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and "did" in event.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_rank(request, stop)
    assert any(isinstance(event, Warned) and "Up to 2 trials of 3 steps" in event.message for event in events)
    report = study_rank(request)
    content = report.to_dict()
    assert (report.trials.num_run, len(content["trials"])) == (1, 2)

    assert content["cost"]["seconds"] >= sum(trial["seconds"] for trial in content["trials"]) > 0
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["score"]["floor"] > content["score"]["ceiling"]
    assert content["recommendation"]["rank"] == 2
    assert [point["d"] for point in content["curves"][0]["points"]] == [4]
    assert {layer["path"].split(".")[-1] for layer in content["layers"]} >= {"q_proj", "down_proj"}
    assert "<svg" in render_study_page(content, "rank")
    for folder in (tmp_path / "study" / "trials").iterdir():  # each is a finished run
        assert flow.resume(folder).num_steps == 3


def test_a_budget_reduces_the_grid_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smallest study takes about .* budget is 1"):
        study_rank(_request(tmp_path, budget_s=1.0))


def test_lora_is_needed_for_its_space(tmp_path: Path) -> None:
    config = config_of(tmp_path, POINTS["clm, packed"]) | {"adapter": {"kind": "none"}}
    with pytest.raises(ConfigError, match=r"need adapter\.kind = lora"):
        study_rank(RankRequest(Run.model_validate(config)))


@pytest.mark.sweep
@pytest.mark.parametrize("space", ["lora", "full"])
def test_a_study_of_several_ranks_seeds_and_methods(tmp_path: Path, space: Any) -> None:
    request = _request(tmp_path, space=space, methods=("did", "said"), ranks=(1, 4), dims=(4, 64), num_seeds=2)
    content = study_rank(request).to_dict()
    assert [row["rank"] for row in content["ranks"]] == ([1, 4] if space == "lora" else [None])
    assert {curve["method"] for curve in content["curves"]} == {"did", "said"}
    for curve in content["curves"]:
        small, large = (point["mean"] for point in curve["points"])
        assert large < small
        (row,) = (row for row in content["ranks"] if row["rank"] == curve["rank"])
        assert curve["ceiling"] == pytest.approx(row["score"]), "the target is that of its own space"
    assert "<svg" in render_study_page(content, "rank")
