"""Events and their JSON."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest

from ingle import events
from ingle.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Progress,
    Proved,
    Sampled,
    Saved,
    Started,
    Step,
    Validated,
    Warned,
)
from tests.stored_results import COMPARISON, REPORT

EVENTS: tuple[Event, ...] = (
    Started({"output": "runs/x"}, {"num_steps": 2}, {}, 1, 2, "checkpoints/step-1"),
    Proved(0, {"log-ratio": {"measured": math.inf, "expected": 0.0, "tolerance": 1e-5}}),
    Sampled(3, 1, ({"prompt": "p", "answer": "a", "status": "stop", "reward": None},)),
    Step(2, 1.5, 10, 5.0, 1e-3, math.inf, 100, 0.5, {"accuracy": 0.5}),
    Validated(2, 1.25, 1, 1.2, -0.05, 0.01, {"chrf": 3.5}, 0.5),
    Evaluated(2, COMPARISON),
    Saved(2, "x", "adapter"),
    Warned("Odd.", None, 3),
    Progress("Reading weights", 1),
    Failed("bad"),
    Finished(2, REPORT),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.tag)
def test_an_event_survives_json(event: Event) -> None:
    data = json.loads(json.dumps(events.to_dict(event), allow_nan=False))
    assert data["event"] == event.tag
    assert events.from_dict(data) == event


def test_tags_are_unique_and_every_event_is_tested() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    assert len({event.tag for event in EVENTS}) == len(EVENTS)


def test_numbers_that_json_lacks_are_strings() -> None:
    step = Step(1, math.nan, 1, 1.0, 1.0, -math.inf, 1, 1.0)
    data = events.to_dict(step)
    assert (data["loss"], data["grad_norm"]) == ("NaN", "-Infinity")
    assert math.isnan(events.from_dict(data).loss)  # type: ignore[union-attr]


@pytest.mark.parametrize("data", [{}, {"event": "exploded"}, {"event": "saved", "step": 1}])
def test_other_data_is_no_event(data: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        events.from_dict(data)
