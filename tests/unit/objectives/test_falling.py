"""The hint that chosen answers become less likely."""

from __future__ import annotations

import pytest

from ingle.objectives.falling import Falling


@pytest.mark.parametrize(
    ("log_ratios", "said"),
    [
        ([-3.0 - 0.1 * step for step in range(20)], True),
        ([-3.0] * 19, False),
        ([3.0] * 20, False),
        ([-0.5] * 20, False),
        ([-30.0 if step % 2 else 25.0 for step in range(20)], False),
    ],
    ids=["they fall", "too few steps", "they rise", "by little", "mere noise"],
)
def test_a_fall_of_the_chosen_answers_is_said_once(log_ratios: list[float], said: bool) -> None:
    watch = Falling()
    for value in log_ratios:
        watch.update(value)
    hint = watch.hint()
    assert (hint is not None) == said
    assert hint is None or "4.0 nats" in hint
    assert watch.hint() is None


def test_an_early_fall_that_ended_is_forgotten() -> None:
    watch = Falling()
    for value in [-5.0] * 10 + [2.0] * 20:
        watch.update(value)
    assert watch.hint() is None
