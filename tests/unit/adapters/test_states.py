"""What a model computes with its adapter on, off, and as training began."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.config.adapter import LoraAdapter, NoAdapter
from ingle.errors import AdapterError
from tests.unit.adapters.test_attachment import llama

IDS = torch.arange(12)[None]
HEAD = LoraAdapter(rank=2, trainable_modules=("lm_head",))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Changes everything that is trained, as steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def attached(adapter: LoraAdapter, *, keeps_initial: bool = True) -> nn.Module:
    model = llama()
    adapters.initialize(model, adapter, adapters.insert(model, adapter), seed=0, keeps_initial=keeps_initial)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter with changed layers and a changed head."""
    folder = tmp_path_factory.mktemp("trained")
    model = attached(HEAD)
    disturb(model)
    adapters.save_adapter(model, folder, HEAD, "tiny")
    return folder


def test_a_new_adapter_begins_at_its_base() -> None:
    base, model = llama(), attached(HEAD)
    assert not adapters.AdapterState(model), "nothing is kept where the base is the initial function"
    disturb(model)
    assert not torch.equal(logits(model), logits(base))
    for state in ("off", "initial"):
        with adapters.use(model, state):
            assert torch.equal(logits(model), logits(base)), state


def test_an_adapter_that_continues_another_begins_there(trained: Path) -> None:
    model = attached(HEAD.model_copy(update={"path": str(trained)}))
    start, base = logits(model), logits(llama())
    disturb(model, seed=2)
    now = logits(model)
    with adapters.use(model, "initial"):
        assert torch.equal(logits(model), start)
        with adapters.use(model, "off"):
            assert torch.equal(logits(model), base)
            with adapters.use(model, "on"):
                assert torch.equal(logits(model), now)
        assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), now)
    assert not torch.equal(start, base) and not torch.equal(start, now)


def test_errors_leave_the_model_as_it_was(trained: Path) -> None:
    model = attached(HEAD.model_copy(update={"path": str(trained)}))
    now = logits(model)
    for state in ("off", "initial"):
        with pytest.raises(RuntimeError), adapters.use(model, state):
            raise RuntimeError
        assert torch.equal(logits(model), now)
    with pytest.raises(AdapterError, match="no role 'critic'"), adapters.use(model, "critic"):
        pass


def test_a_function_that_was_not_kept_is_refused(trained: Path) -> None:
    model = attached(HEAD.model_copy(update={"path": str(trained)}), keeps_initial=False)
    whole = llama()
    adapters.attach(whole, NoAdapter(kind="none"), seed=0)
    for each in (model, whole):
        assert not adapters.has_initial(each)
        with pytest.raises(AdapterError, match="was not kept"), adapters.use(each, "initial"):
            pass


def test_the_digest_names_the_initial_function(trained: Path) -> None:
    """It depends on what is kept, not on what is trained now, and survives a round through a checkpoint."""
    section = HEAD.model_copy(update={"path": str(trained)})
    fresh, continued = attached(HEAD), attached(section)
    identity = adapters.identify(fresh)
    assert adapters.identify(continued).sha256 == identity.sha256 == adapters.identify(llama()).sha256
    digests = [adapters.initial_digest(model, identity) for model in (fresh, continued)]
    assert digests[0] != digests[1]
    for model, digest in zip((fresh, continued), digests, strict=True):
        disturb(model)
        assert adapters.initial_digest(model, identity) == digest
    resumed = attached(section)
    state = copy.deepcopy(adapters.AdapterState(resumed).state_dict())
    disturb(resumed)
    start = {name: value + 1 for name, value in state.items()}
    adapters.AdapterState(resumed).load_state_dict(start)
    assert adapters.initial_digest(resumed, identity) not in digests
    adapters.AdapterState(resumed).load_state_dict(state)
    assert adapters.initial_digest(resumed, identity) == digests[1]
