"""Ranks with a sharded model sample what one process samples, each its own answers, in steps that all take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ingle import adapters
from ingle.assembly import assemble
from ingle.config.run import Run
from ingle.models import Request, Sampling, make_sampler
from ingle.parallel import Mesh, local
from tests.axis import POINTS, config_of
from tests.distributed.ranks import run_ranks

REQUESTS = [
    Request(draw, answer, [(5 * draw + place) % 28 + 4 for place in range(3 + 9 * draw)], 3 + 5 * draw)
    for draw in range(3)
    for answer in range(3)
]
Sampled = dict[tuple[int, int], tuple[list[int], list[float]]]


def _sample(mesh: Mesh, config: dict[str, Any]) -> tuple[bool, Sampled, int]:
    """Samples this rank's answers; then again, until one rank asks to stop."""
    parts = assemble(Run.model_validate(config), lambda event: None)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(parts.model):
            local(parameter).add_(0.05)
    shards = parts.plan.strategy.shards_base
    options = Sampling(num_slots=4, prefill_tokens=8)
    sampler = make_sampler(parts.model, parts.tokenizer, options, mesh=mesh if shards else None)
    own = [each for each in REQUESTS if each.draw % mesh.world_size == mesh.dist_rank]
    found = {(each.draw, each.answer): each for each in sampler.run(own, stop=lambda: False)}
    calls: list[int] = []

    def stop() -> bool:
        calls.append(0)
        return mesh.dist_rank == 0 and len(calls) > 2

    stopped = len(list(sampler.run(own, stop=stop)))
    figures = {key: (each.ids.tolist(), each.logps.tolist()) for key, each in found.items()}
    return sampler.is_invariant, figures, stopped


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["zero3", "zero1"])
def test_ranks_sample_what_one_process_samples(tmp_path: Path, kind: str) -> None:
    def config(kind: str) -> dict[str, Any]:
        found = config_of(tmp_path, POINTS["clm, packed"])
        found["data"].pop("validation", None)
        found["parallel"]["kind"] = kind
        return found | {"output": str(tmp_path / kind)}

    ((is_invariant, expected, _),) = run_ranks(1, _sample, config("none"))
    assert is_invariant and len(expected) == len(REQUESTS)
    both = run_ranks(2, _sample, config(kind))
    assert all(invariant for invariant, _, _ in both)
    assert both[0][2] == 0 and (kind != "zero3" or both[1][2] == 0), "a rank did not stop with the other"
    found = {**both[0][1], **both[1][1]}
    assert found.keys() == expected.keys()
    for key, (ids, logps) in expected.items():
        np.testing.assert_array_equal(found[key][0], ids)
        np.testing.assert_array_equal(found[key][1], logps)
