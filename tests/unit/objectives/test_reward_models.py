"""Trained reward models score sampled answers: as a role of the policy, and as a model of their own."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ingle import adapters, stopping
from ingle.config.adapter import LoraAdapter
from ingle.config.model import ModelConfig
from ingle.config.preferences import Reward
from ingle.data import Example, Message, prompt_ids
from ingle.data.encode_prompts import answer_ending
from ingle.errors import AdapterError, ModelError
from ingle.models import load_model, model_task
from ingle.objectives.reward_models import RewardModel, insert_reward_role
from ingle.parallel import Mesh
from tests.conftest import make_tokenizer
from tests.tiny import write_llama

MESH = Mesh(torch.device("cpu"))
SECTION = LoraAdapter(rank=3, alpha=4.5)
POLICY = LoraAdapter(rank=2)


class Trained:
    """A reward model in a folder, its base, and the tokenizer of both."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.run = tokenizer, folder / "reward"
        base = write_llama(folder / "base", tokenizer, hidden_size=32, intermediate_size=64)
        self.base = ModelConfig(id=str(base), dtype="float32")
        self.model: Any = load_model(self.base, task=model_task(Reward(kind="reward")))
        adapters.attach(self.model, SECTION, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in adapters.trainable_parameters(self.model):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        adapters.save_adapter(self.model, self.run / "adapter", SECTION, self.base.id)

    def as_role(self, section: LoraAdapter = POLICY) -> RewardModel:
        """As part of a policy that differs from its base."""
        policy: Any = load_model(self.base)
        selection = adapters.insert(policy, section)
        config: Any = SimpleNamespace(model=self.base, base=None)
        role = insert_reward_role(policy, config, 0, str(self.run))
        assert role is not None
        adapters.initialize(policy, section, selection, seed=0)
        for _, parameter in adapters.trainable_parameters(policy):
            torch.nn.init.normal_(parameter)
        found = RewardModel(str(self.run), policy, role, self.tokenizer, MESH)
        found.load(None, no_other)
        return found

    def as_model(self, tokenizer: Any = None) -> RewardModel:
        found = RewardModel("reward", torch.nn.Module(), None, self.tokenizer, MESH)  # type: ignore[arg-type]
        found.load(None, lambda path: SimpleNamespace(model=self.model, tokenizer=tokenizer or self.tokenizer))
        return found

    def score(self, ids: list[int]) -> float:
        """The score of the architecture, of one text, at its last token."""
        with torch.no_grad():
            hidden = self.model.model(torch.tensor([ids])).last_hidden_state
            return float(self.model.score(hidden[0, -1]))


def no_other(path: str) -> Any:
    raise AssertionError(f"{path} is opened as a model of its own")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("reward"), make_tokenizer())


@pytest.mark.parametrize("own", [False, True], ids=["role", "model"])
def test_scores_are_those_of_the_reward_model(trained: Trained, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingle.objectives.reward_models._ROW_TOKENS", 40)  # several rows
    generator = np.random.default_rng(0)
    texts = [generator.integers(5, 90, length).astype(np.int32) for length in (9, 30, 4, 22, 60, 1)]
    found = (trained.as_model() if own else trained.as_role()).score(texts)
    np.testing.assert_allclose(found, [trained.score(ids.tolist()) for ids in texts], rtol=2e-5, atol=2e-6)
    assert found.std() > 0.01


def test_a_stop_ends_the_scoring(trained: Trained) -> None:
    with stopping.listening(), stopping.polled():
        signal.raise_signal(signal.SIGTERM)
        assert trained.as_role().score([np.array([7, 8], np.int32)]) is None


def test_what_the_template_writes_after_an_answer_is_read_as_in_training(trained: Trained) -> None:
    end, tail = answer_ending(trained.tokenizer)
    assert trained.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert trained.tokenizer.decode(tail) == "\n"
    prompt = prompt_ids(trained.tokenizer, Example("f:1", messages=(Message("user", "one?"),)))
    answer = trained.tokenizer("two", add_special_tokens=False)["input_ids"]
    finished, cut = prompt + answer + [end], prompt + answer
    found = trained.as_role().score([np.array(ids, np.int32) for ids in (finished, cut)])
    expected = [trained.score([*finished, *tail.tolist()]), trained.score(cut)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_a_tokenizer_without_a_template_has_no_tail(tokenizer_factory: Any) -> None:
    plain = tokenizer_factory(chat_template=None)
    end, tail = answer_ending(plain)
    assert end == plain.eos_token_id and not len(tail)


def test_other_layers_make_it_a_model_of_its_own(trained: Trained) -> None:
    for section, base in (
        (LoraAdapter(rank=2, target_modules=("q_proj",)), trained.base),
        (POLICY, ModelConfig(id="x")),
    ):
        policy: Any = load_model(trained.base)
        adapters.insert(policy, section)
        config: Any = SimpleNamespace(model=base, base=None)
        assert insert_reward_role(policy, config, 0, str(trained.run)) is None


def test_what_is_no_reward_model_is_refused(trained: Trained, tokenizer_factory: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another vocabulary"):
        trained.as_model(tokenizer_factory(special=("<|a|>", "<|b|>", "<|c|>")))
    model = RewardModel("reward", torch.nn.Module(), None, trained.tokenizer, MESH)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no causal model that scores"):
        model.load(None, lambda path: SimpleNamespace(model=load_model(trained.base), tokenizer=trained.tokenizer))
    policy: Any = load_model(trained.base)
    adapters.attach(policy, SECTION, seed=0)
    adapters.save_adapter(policy, tmp_path / "adapter", SECTION, trained.base.id)
    headless = Trained.__new__(Trained)
    headless.__dict__ |= trained.__dict__ | {"run": tmp_path}
    with pytest.raises(AdapterError, match="no head that scores"):
        headless.as_role()
