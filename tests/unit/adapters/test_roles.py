"""A policy, a value and a reward over one base."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from ingle import adapters
from ingle.config.adapter import DoraAdapter, LoraAdapter
from ingle.errors import AdapterError
from tests.unit.adapters.test_attachment import llama
from tests.unit.adapters.test_states import disturb, logits

POLICY = LoraAdapter(rank=2, trainable_modules=("norm",))
DORA = DoraAdapter(kind="dora", rank=2, init="pissa")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def with_roles(section: LoraAdapter | DoraAdapter = POLICY) -> nn.Module:
    model = llama()
    selection = adapters.insert(model, section)
    adapters.add_role(model, "value", rank=3)
    adapters.add_role(model, "reward", rank=4, scale=0.5, trained=False)
    adapters.initialize(model, section, selection, seed=0)
    return model


@pytest.mark.parametrize("section", [POLICY, DORA])
def test_roles_do_not_affect_each_other(section: LoraAdapter | DoraAdapter) -> None:
    model, base = with_roles(section), logits(llama())
    alone = llama()
    adapters.attach(alone, section, seed=0)
    assert torch.equal(logits(model), logits(alone))
    assert adapters.identify(model).sha256 == adapters.identify(alone).sha256
    for name in ("value", "reward"):
        with adapters.use(model, name):
            torch.testing.assert_close(logits(model), base)
    disturb(model)
    adapters.update_norms(model)
    policy = logits(model)
    with adapters.use(model, "value"):
        value = logits(model)
        with adapters.use(model, "off"):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), value)
    assert torch.equal(logits(model), policy)
    assert not torch.equal(value, base) and not torch.equal(value, policy)


def test_only_the_role_in_use_gets_gradients() -> None:
    model = with_roles()
    disturb(model)
    for state, key in (("on", "q_proj.lora_b"), ("value", "roles.value.lora_b"), ("reward", "nothing")):
        model.zero_grad()
        with adapters.use(model, state):
            if state != "reward":
                model(torch.arange(12)[None]).logits.square().sum().backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert any(key in name for name in moved) == (state != "reward")
        assert all(("roles." in name) == (state == "value") for name in moved if ".lora_" in name), state


def test_a_role_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    policy, dora = LoraAdapter(rank=2), with_roles(DORA)
    model = with_roles(policy)
    disturb(model)
    adapters.save_role(model, "value", tmp_path / "value", "tiny", identity=adapters.identify(model))
    adapters.save_adapter(model, tmp_path / "policy", policy, "tiny")
    adapters.save_adapter(dora, tmp_path / "dora", DORA, "tiny")
    with adapters.use(model, "value"):
        wanted = logits(model)
    other = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "value")).eval()
    torch.testing.assert_close(logits(other), wanted)
    for name, expected in (("value", wanted), ("policy", logits(model))):
        alone = llama()
        adapters.load_adapter(alone, tmp_path / name)
        torch.testing.assert_close(logits(alone), expected)
    fresh = with_roles(policy)
    adapters.load_role(fresh, "value", tmp_path / "value")
    with adapters.use(fresh, "value"):
        assert torch.equal(logits(fresh), wanted)
    with pytest.raises(AdapterError, match="has rank 3 and scale 2, but the role reward has rank 4"):
        adapters.load_role(fresh, "reward", tmp_path / "value")
    with pytest.raises(AdapterError, match="cannot have the role value"):
        adapters.load_role(fresh, "value", tmp_path / "dora")


def test_names_of_roles() -> None:
    model = with_roles()
    for name in ("value", "initial", "a.b"):
        with pytest.raises(AdapterError, match="cannot name a role"):
            adapters.add_role(model, name, rank=2)
    with pytest.raises(AdapterError, match="no role 'critic'"), adapters.use(model, "critic"):
        pass
    with pytest.raises(AdapterError, match="Only layers with an adapter"):
        adapters.add_role(llama(), "value", rank=2)
