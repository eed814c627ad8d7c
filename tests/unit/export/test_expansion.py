"""Layers that are added to a model and change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ingle.errors import ConfigError, ModelError
from ingle.export import expand
from ingle.models.loading.layout_choice import enliven
from tests.contract.models.tiny_types import small_config


def save(kind: str, folder: Path, auto: type = AutoModelForCausalLM) -> Path:
    torch.manual_seed(0)
    model = auto.from_config(small_config(kind))  # type: ignore[attr-defined]
    enliven(model)
    model.save_pretrained(folder)
    return folder


OTHERS = [pytest.param(kind, marks=pytest.mark.sweep) for kind in ("gpt2", "gemma2", "mixtral", "gpt_oss", "olmo2")]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "lfm2", *OTHERS])
def test_transformers_computes_the_same_with_the_new_layers(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "small")
    before = AutoModelForCausalLM.from_pretrained(folder)
    num_layers = before.config.num_hidden_layers
    result = expand(str(folder), 2, tmp_path / "large")
    after = AutoModelForCausalLM.from_pretrained(result.path)
    assert after.config.num_hidden_layers == result.num_layers == num_layers + 2
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(after(ids).logits, before(ids).logits)
    new = [after.get_submodule(name) for name in result.new_layers]
    assert sum(p.numel() for layer in new for p in layer.parameters()) == result.num_new
    assert sum(p.numel() for p in after.parameters()) == result.num_weights

    # What the layers compute can be learned: their last matrices get a gradient.
    after(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for layer in new for name, p in layer.named_parameters() if not p.any()}
    assert any(each is not None and each.any() for each in gradients.values())


def test_what_cannot_be_expanded_is_refused(tmp_path: Path) -> None:
    encoder = save("bert", tmp_path / "bert", AutoModelForMaskedLM)
    with pytest.raises(ModelError, match="cannot be added to this model without changing it"):
        expand(str(encoder), 1, tmp_path / "large")
    decoder = save("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match="between 1 and as many can be added"):
        expand(str(decoder), 50, tmp_path / "large")
    with pytest.raises(ConfigError, match="exists"):
        expand(str(decoder), 1, encoder)
    assert not list(tmp_path.glob("large*")), "nothing is left behind"
