"""Each lesson speaks to a run that acts against it, and is silent otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from ingle.config import Run
from ingle.config.lessons import LESSONS, Facts, find_lessons

_LARGE = {"parameters": 7_000_000_000, "trained": 40_000_000, "tokens": 1_000_000, "epochs": 1.0, "lr": 2e-4}
_FULL = {"adapter": "none"}


def _names(sections: dict[str, Any], **facts: Any) -> set[str]:
    run = Run.model_validate(
        {"model": {"id": "m"}, "data": {"sources": ["d.jsonl"]}, "output": "o", "objective": "sft"} | sections
    )
    found = {note.text for note in find_lessons(Facts(run, **{**_LARGE, **facts}))}
    return {
        lesson.name
        for lesson in LESSONS
        if lesson.applies(known := Facts(run, **{**_LARGE, **facts})) and lesson.message(known) in found
    }


_LORA = {"adapter": {"kind": "lora", "rank": 16}}


@pytest.mark.parametrize(
    ("name", "against", "silent"),
    [
        ("epochs", (_LORA, {"epochs": 5.0}), (_LORA, {"epochs": 2.0})),
        ("alpha", ({"adapter": {"rank": 16, "alpha": 16.0}}, {}), ({"adapter": {"rank": 16, "alpha": 32.0}}, {})),
        (
            "targets",
            ({"adapter": {"target_modules": ["q_proj", "self_attn.v_proj"]}}, {}),
            ({"adapter": {"target_modules": ["q_proj", "down_proj"]}}, {}),
        ),
        ("rate-of-full-fine-tuning", (_FULL, {"lr": 2e-4}), (_FULL, {"lr": 2e-5})),
        ("rate-of-full-fine-tuning", (_FULL, {"lr": 2e-4}), (_FULL, {"lr": 2e-4, "parameters": 6_000_000})),
        ("rate-of-lora", (_LORA, {"lr": 1e-5}), (_LORA, {"lr": 2e-4})),
        (
            "rate-of-virtual-tokens",
            ({"adapter": {"kind": "prompt"}}, {"lr": 2e-4}),
            ({"adapter": {"kind": "prompt"}}, {"lr": 0.03}),
        ),
        (
            "rate-against-rank",
            ({"adapter": {"rank": 64, "rslora": True}}, {}),
            ({"adapter": {"rank": 64, "rslora": True, "alpha": 16.0}}, {}),
        ),
        ("capacity", (_LORA, {"trained": 1000, "tokens": 10_000_000}), (_LORA, {})),
        ("forgetting", (_FULL, {"epochs": 2.0, "lr": 1e-5}), (_LORA, {"epochs": 2.0})),
        ("dora", ({"adapter": {"kind": "dora"}}, {}), (_LORA, {})),
    ],
)
def test_a_lesson_speaks_where_it_applies(
    name: str, against: tuple[dict[str, Any], dict[str, Any]], silent: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    assert name in _names(against[0], **against[1])
    assert name not in _names(silent[0], **silent[1])


def test_lessons_can_be_turned_off() -> None:
    assert _names({"adapter": {"kind": "dora"}}) == {"dora"}
    assert not _names({"adapter": {"kind": "dora"}, "train": {"lessons": False}})
