"""Inputs of reward functions: frames, and functions whose source is mutated."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.sandbox import Refused

_FRAMES: tuple[dict[str, Any], ...] = (
    {"id": 1, "outcomes": [[1.5, "ok", ""], [None, "none", ""]], "extra": {"a": [1, "x"]}, "metrics": {"m": 0.5}},
    {"id": 2, "failed": ["error", "ValueError: \u2028 no"]},
    {},
)

_FUNCTION = """\
import re


def reward(prompts, completions, completion_ids, answer, log_extra=None, log_metric=None, **kwargs):
    scores = []
    for text, ids, target in zip(completions, completion_ids, answer):
        found = re.findall(r"-?\\d+", text)
        score = 1.0 if found and int(found[-1]) == int(target) else 0.0
        while len(ids) > 3 and score > 0.5:
            score = score - 0.125
            ids = ids[:-1]
        scores.append(score if text else None)
    log_extra("found", [len(text) for text in completions])
    log_metric("mean", sum(score or 0 for score in scores) / len(scores))
    print(scores)
    return scores
"""


def make_frames(folder: Path, shared: Path) -> None:
    """Writes frames, one after the other."""
    contents = [json.dumps(frame).encode() for frame in _FRAMES]
    (folder / "frames.bin").write_bytes(b"".join(struct.pack(">I", len(each)) + each for each in contents))


def read_frames(folder: Path, out: Path) -> Any:
    """Returns the frames of a file, which arrive in pieces."""
    from ingle.rewards.frames import decode

    content, buffer, found = (folder / "frames.bin").read_bytes(), bytearray(), []
    try:
        for start in range(0, len(content), 7):
            buffer += content[start : start + 7]
            while (frame := decode(buffer)) is not None:
                found.append(frame)
    except ValueError as error:
        raise Refused(f"frames.bin: {error}") from None
    return {"frames": json.dumps(found)}


def expect_frames(folder: Path) -> Mapping[str, Any]:
    """Returns the frames of a file; raises if one is none."""
    content, at, found = (folder / "frames.bin").read_bytes(), 0, []
    while at + 4 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        assert size <= 256 << 20
        if at + 4 + size > len(content):
            break
        found.append(json.loads(content[at + 4 : at + 4 + size]))
        assert isinstance(found[-1], dict)
        at += 4 + size
    return {"frames": json.dumps(found)}


def make_function(folder: Path, shared: Path) -> None:
    """Writes a reward function."""
    (folder / "function.py").write_text(_FUNCTION)


def score(folder: Path, out: Path) -> Any:
    """Scores a group with the function; whatever it is, every answer has a status."""
    from ingle.config.rewards import FunctionReward
    from ingle.rewards import Group, RewardPool
    from ingle.rewards.scores import STATUSES

    reward = FunctionReward(path=str(folder / "function.py"), time_limit_s=0.5, memory_mb=256)
    texts = ["it is 12", "12 and 7", "", "no"]
    ids = [[1, 2], [1, 2, 3, 4, 5], [], [3]]
    with RewardPool([reward]) as pool:
        scores = pool.score(Group("q", texts, ids, {"answer": "12"}))
    values, statuses = scores.values[:, 0].tolist(), [row[0] for row in scores.statuses]
    assert len(values) == len(statuses) == len(texts)
    for value, status in zip(values, statuses, strict=True):
        assert status in STATUSES and math.isfinite(value) == (status == "ok")
    assert all(len(each) == len(texts) for each in scores.extra.values())
    return {"statuses": statuses, "values": [str(value) for value in values]}
