"""Predicted bytes of the optimizer, against what it keeps after a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from ingle import models
from ingle.adapters import select
from ingle.config import Run
from ingle.planning.memory import trainable_parameters
from ingle.planning.update_rules import active_parameters, state_bytes
from ingle.training.groups import build_optimizer
from ingle.training.model_shape import model_shape
from tests.tiny import SIZES, make_random

_SCALARS = {"step", "norm"}


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "adamw"},
        {"kind": "galore", "rank": 8},
        {"kind": "apollo", "rank": 8},
        {"kind": "apollo_mini"},
        {"kind": "lisa", "active": 1},
        {"kind": "subspace", "dim": 50},
    ],
    ids=lambda rule: rule["kind"],
)
def test_predicted_states_are_those_after_a_step(rule: dict[str, Any]) -> None:
    run = Run.model_validate(
        {
            "model": {"id": "m"},
            "adapter": {"kind": "none"},
            "data": {"sources": ["d.jsonl"]},
            "optim": {"rule": rule},
            "output": "o",
        }
    )
    model = make_random(LlamaConfig(**SIZES), torch.bfloat16)
    layers = models.repeated_layers(model)
    shape = model_shape(model, select(model, run.adapter), models.choose_formats(model, run.model, run.base))
    optimizer = build_optimizer(run, model, layers)
    optimizer.begin(1)
    sum(p.float().sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step(1e-3)
    state = {name: value for name, value in optimizer.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = sum(v.nbytes for name, v in state.items() if name.partition(".")[0] not in _SCALARS | {"master"})
    trained = trainable_parameters(run, shape)
    predicted = state_bytes(run, shape, trained)
    assert kept == predicted
    masters = sum(v.numel() for name, v in state.items() if name.startswith("master.") and v.dtype == torch.float32)
    assert masters == active_parameters(run, shape, trained) or rule["kind"] == "subspace"
