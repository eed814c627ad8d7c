"""An expanded model is an ordinary one that computes the same, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from ingle.config import ModelConfig
from ingle.errors import ModelError
from ingle.models.expansion import expand
from ingle.models.loading.layout_choice import enliven
from tests.contract.models.tiny_types import small_config, small_encoder_config


def _write(folder: Path, model: str) -> ModelConfig:
    kind = transformers.AutoModelForMaskedLM if model == "bert" else transformers.AutoModelForCausalLM
    config = small_encoder_config(model) if model == "bert" else small_config(model)
    torch.manual_seed(0)
    built = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        enliven(built)
    built.save_pretrained(folder)
    return ModelConfig(id=str(folder), dtype="float32")


@pytest.mark.parametrize(
    "model", ["llama", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("gpt2", "gemma2", "mixtral"))]
)
def test_new_layers_compute_nothing_and_are_whole(model: str, tmp_path: Path) -> None:
    config = _write(tmp_path / "before", model)
    found = expand(config, 2, tmp_path / "after")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(after(input_ids=ids).logits, before(input_ids=ids).logits)
    layers = after.config.num_hidden_layers
    assert layers == before.config.num_hidden_layers + 2
    assert found.added[-1] == layers - 1
    modules = dict(after.named_modules())
    for path in found.modules:
        weights = [weight for name, weight in modules[path].named_parameters() if name.endswith("weight")]
        assert 0 < sum(bool((weight == 0).all()) for weight in weights) < len(weights)


@pytest.mark.sweep
def test_layers_that_do_not_pass_through_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"differs from .*: its logits by up to"):
        expand(_write(tmp_path / "before", "bert"), 2, tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_groups_are_equal(tmp_path: Path) -> None:
    config = _write(tmp_path / "before", "llama")
    layers = json.loads((tmp_path / "before" / "config.json").read_text())["num_hidden_layers"]
    with pytest.raises(ModelError, match=f"{layers} layers cannot be divided into {layers + 1} equal groups"):
        expand(config, layers + 1, tmp_path / "after")
