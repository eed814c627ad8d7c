"""Sharded models return to their base and to the function that training began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from ingle import adapters, models
from ingle.config.adapter import LoraAdapter
from ingle.config.model import ModelConfig
from ingle.parallel import Mesh, local
from tests.contract.models.tiny_types import small_config
from tests.distributed.ranks import run_ranks
from tests.distributed.test_loading import shard

SECTION = LoraAdapter(rank=2, trainable_modules=("norm",))


class Found(NamedTuple):
    """Logits in every state, and the digest of the initial function."""

    logits: dict[str, list[float]]
    digest: str


def _write(folder: Path) -> None:
    torch.manual_seed(0)
    config = small_config("llama")
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    adapters.attach(model, SECTION, seed=0)
    _change(model, 0.1)
    adapters.save_adapter(model, folder / "adapter", SECTION, "model")


def _change(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            local(parameter).add_(amount)


def states(mesh: Mesh, folder: Path, *, alone: bool = False) -> Found:
    """Changes what a continued adapter trains, and computes logits in every state."""
    source = ModelConfig(id=str(folder / "model"), dtype="float32")
    section = SECTION.model_copy(update={"path": str(folder / "adapter")})
    model = models.meta_model(source, "cpu", torch.float32)
    selection = adapters.insert(model, section)
    if not alone:
        shard(model, "fsdp", mesh)
    options: dict[str, Any] = {} if alone else {"mesh": mesh}
    facts = models.load_weights(model, source, "cpu", torch.float32, describe=adapters.describe, **options)
    identity = adapters.identify(model, facts or None)
    adapters.initialize(model, section, selection, seed=0, identity=identity, keeps_initial=True)
    found: dict[str, list[float]] = {}

    def logits() -> list[float]:
        with torch.no_grad():
            result: list[float] = model.eval()(torch.arange(6)[None]).logits.flatten().tolist()
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return result

    found["start"] = logits()
    _change(model, 0.05)
    for state in ("on", "off", "initial", "on"):
        with adapters.use(model, state):
            found[state] = logits()
    return Found(found, adapters.initial_digest(model, identity))


def test_ranks_return_to_the_initial_function(tmp_path: Path) -> None:
    _write(tmp_path)
    expected = states(Mesh(torch.device("cpu")), tmp_path, alone=True)
    assert expected.logits["initial"] == expected.logits["start"]
    for found in run_ranks(2, states, tmp_path):
        assert found.digest == expected.digest
        for state, values in expected.logits.items():
            torch.testing.assert_close(torch.tensor(found.logits[state]), torch.tensor(values))
        assert found.logits["initial"] == found.logits["start"] != found.logits["on"] != found.logits["off"]
