"""The value function of PPO: a head, and an adapter of its own next to the policy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from ingle import adapters
from ingle.config.adapter import LoraAdapter
from ingle.config.optim import OptimConfig
from ingle.config.policy import ValueConfig
from ingle.data.batch import Batch, collate, round_up
from ingle.data.types import Sample
from ingle.models import forward_hidden, recompute_layers
from ingle.objectives.values import ROLE, ScalarHead, Values
from ingle.training.groups import parameter_groups
from tests.tiny import SIZES, make_random

LLAMA = LlamaConfig(**SIZES)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def batch() -> Batch:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 64, length).astype(np.int32) for length in (9, 21)]
    return round_up(collate([Sample(ids, ids) for ids in documents]))


def policy(config: PretrainedConfig = LLAMA, *, recompute: bool = False, fused: bool = False) -> Any:
    """A model with two functions that differ from the base and from each other."""
    model, section = make_random(config, torch.float32), LoraAdapter(rank=2)
    selection = adapters.insert(model, section)
    adapters.add_role(model, ROLE, rank=3)
    if recompute:
        recompute_layers(model, adapters.as_now)
    adapters.initialize(model, section, selection, seed=0)
    assert adapters.fuse(model).fused == (2 if fused else 0) or not fused
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


class Both(nn.Module):
    """A policy and its values, as a step of PPO computes them: two passes, then one backward pass."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__()
        self.model = model
        size = model.get_output_embeddings().in_features
        head = ScalarHead(size, torch.device("cpu"))
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
        self.values = Values(model, ValueConfig(**options), head)

    def lr_ratio(self, name: str) -> float:
        return self.values.lr_ratio if self.values.owns(name) else 1.0

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_NH = forward_hidden(self.model, batch)[0]
        return hidden_NH, self.values(batch, hidden_NH)


def gradients(module: Both) -> dict[str, Tensor]:
    hidden, values = module(batch())
    ((hidden**2).sum() + (values**3).sum()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("config", "fused"), [(LLAMA, False), (LLAMA, True), (GPT2, False)], ids=["layers", "fused", "gpt2"]
)
def test_recomputed_layers_have_the_same_bits(config: PretrainedConfig, fused: bool) -> None:
    plain = gradients(Both(policy(config, fused=fused)))
    again = gradients(Both(policy(config, fused=fused, recompute=True)))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(".roles.value." in name for name in plain) and any(name.endswith("values.head.weight") for name in plain)


def test_each_pass_trains_its_own_factors() -> None:
    """The gradient of both losses is that of one plus that of the other, each computed alone."""
    both = gradients(Both(policy()))
    module = Both(policy())
    (forward_hidden(module.model, batch())[0] ** 2).sum().backward()
    with adapters.use(module.model, ROLE):
        (module.values.head(forward_hidden(module.model, batch())[0]) ** 3).sum().backward()
    alone = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert both.keys() == alone.keys()
    for name, found in both.items():
        torch.testing.assert_close(found, alone[name], msg=name)


def test_values_of_the_policys_trunk() -> None:
    """They read the policy's hidden states, and change the policy only if that is wanted."""
    detached, attached = (Both(policy(), trunk="policy", detach=detach) for detach in (True, False))
    for module, moves in ((detached, False), (attached, True)):
        hidden, values = module(batch())
        torch.testing.assert_close(values, hidden.detach() @ module.values.head.weight[0])
        values.sum().backward()
        assert any(p.grad is not None for p in module.model.parameters()) is moves


def test_values_begin_at_the_mean_reward_unless_they_were_loaded() -> None:
    for path, first in ((None, 0.5), ("a reward model", 0.0)):
        head = ScalarHead(64, torch.device("cpu"))
        Values(nn.Identity(), ValueConfig(path=path), head).begin_at(0.5)  # type: ignore[arg-type]
        values = head(torch.randn(3, 64, dtype=torch.bfloat16))
        assert values.dtype == torch.float32 and values.tolist() == [first] * 3


def test_values_have_their_own_learning_rate() -> None:
    module = Both(policy(), lr_ratio=3.0)
    groups = parameter_groups(module.model, LoraAdapter(rank=2), OptimConfig(), more=module)
    found = {name: group.lr_ratio for group in groups for name, _ in group.parameters}
    assert len(found) == sum(p.requires_grad for p in module.parameters())
    assert found["values.head.weight"] == 3.0
    assert {ratio for name, ratio in found.items() if ".roles.value." in name} == {3.0}
    assert {ratio for name, ratio in found.items() if ".roles." not in name and "head" not in name} == {1.0}
