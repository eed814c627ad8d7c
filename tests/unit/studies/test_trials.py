"""Trials: their options, their names, and what a stopped run leaves for them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ingle import flow
from ingle.config.run import Run
from ingle.errors import ConfigError, Interrupted
from ingle.events import Event, Step
from ingle.studies import Trial, Trials
from ingle.studies.trials import shared_options
from ingle.training.checkpoint import read


def _run(folder: Path, **sections: Any) -> Run:
    config = {"model": {"id": "m"}, "data": {"sources": ["d.jsonl"]}, "output": str(folder)}
    return Run.model_validate(config | sections)


def _trial(**options: Any) -> Trial:
    return Trial("x", options, 1e-3, 4)


def test_options_are_laid_over_the_config(tmp_path: Path) -> None:
    base = _run(
        tmp_path, adapter={"kind": "lora", "rank": 8, "target_modules": ["q_proj"]}, evaluate={"sources": ["t.jsonl"]}
    )
    trials = Trials(base, shared_options(base, 20))
    run = trials.run_of(_trial(adapter={"rank": 2}))
    assert run.adapter == base.adapter.model_copy(update={"rank": 2})
    assert (run.optim.lr, run.seed, run.train.num_steps, run.task) == (1e-3, 4, 20, None)
    assert run.data.validation is not None and run.data.validation.share == 0.1
    other = trials.run_of(_trial(adapter={"kind": "ia3"}))
    assert (other.adapter.kind, other.adapter.target_modules) == ("ia3", None)  # type: ignore[union-attr]
    given = _run(tmp_path, data={"sources": ["d.jsonl"], "validation": "v.jsonl"})
    assert Trials(given, shared_options(given, 20)).run_of(_trial()).data.validation == given.data.validation


def test_a_name_says_what_is_tried_and_differs_with_any_option(tmp_path: Path) -> None:
    base = _run(tmp_path)
    names = {
        Path(trials.run_of(_trial(**options)).output).name
        for trials in (Trials(base, shared_options(base, 20)), Trials(base, shared_options(base, 30)))
        for options in ({}, {"adapter": {"rank": 2}})
    }
    assert len(names) == 4
    assert all(name.startswith("x-lr-0.001-seed-4-") for name in names)
    with pytest.raises(ConfigError, match="orthogonal needs even ranks"):
        Trials(base, {}).run_of(_trial(adapter={"rank": 3, "init": "orthogonal"}))


@pytest.mark.sweep
def test_a_run_that_is_stopped_after_its_last_step_keeps_its_last_validation(tmp_path: Path) -> None:
    from tests.axis import POINTS, config_of

    config = config_of(tmp_path, POINTS["clm, packed"]) | {"evaluate": {"every": 4}}
    config["train"]["save_every"] = 0

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        flow.finetune(Run.model_validate(config), stop)
    flow.resume(tmp_path / "run")
    assert "end_1" in read(tmp_path / "run" / "checkpoints" / "step-4").state("selection")
