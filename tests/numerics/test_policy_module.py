"""The loss module of policies on a Llama over 3 tokens: exact gradients, however the answers are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from ingle.config.policy import Rloo
from ingle.data.batch import Batch, collate, round_up
from ingle.data.shared_prompts import share
from ingle.objectives.policy import PolicyLoss
from ingle.objectives.rollouts.buffer import SampleBuffer
from tests.exact_world import ANSWERS, LENGTHS, REWARDS
from tests.tiny import make_random

PROMPT = np.arange(20) % 3
NUMBER = len(ANSWERS)


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_random(
        LlamaConfig(vocab_size=3, num_hidden_layers=1, max_position_embeddings=32, **sizes), torch.float64
    )


def make(**columns: Any) -> SampleBuffer:
    """Returns all answers to one prompt, each once."""
    buffer = SampleBuffer(
        {
            "prompt_ids": np.tile(PROMPT, NUMBER).astype(np.int32),
            "prompt_lengths": np.full(NUMBER, len(PROMPT)),
            "ids": np.array(ANSWERS, np.int32).flatten(),
            "lengths": LENGTHS,
            **{name: np.zeros(NUMBER, np.int64) for name in ("draws", "rows")},
            "answers": np.arange(NUMBER),
        }
    )
    return buffer.adding(**columns)


def config(**options: Any) -> Rloo:
    return Rloo.model_validate({"kind": "rloo", "rewards": ["r.py"], "clip": "none", **options})


def batches(buffer: SampleBuffer, parts: Sequence[Sequence[int]], *, shared: bool = False) -> list[Batch]:
    made = [buffer.samples(np.array(part), masked=False) for part in parts]
    return [round_up(collate(share(samples) if shared else samples)) for samples in made]


def gradients(module: PolicyLoss, parts: Sequence[Batch]) -> list[Tensor]:
    """Returns the gradients of a step over micro-batches."""
    module.zero_grad()
    counts: dict[str, float] = {}
    for part in parts:
        for name, count in module.counts(part).items():
            counts[name] = counts.get(name, 0.0) + count
    for part in parts:
        losses = module(part).losses
        sum(losses[term.name] / counts[term.denominator] * term.weight for term in module.terms).backward()
    return [parameter.grad.clone() for parameter in module.model.parameters()]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors, sizes = ([float(each.norm()) for each in parts] for parts in (map(torch.sub, found, expected), expected))
    return max(errors) / max(sizes)


def chances(module: PolicyLoss) -> Tensor:
    """Returns the probability of each answer, [27], with gradient."""
    (batch,) = batches(make(), [range(NUMBER)])
    return module.reference_logps(batch).view(NUMBER, -1).sum(1).exp()


WHOLE, SINGLE = [range(NUMBER)], [[number] for number in range(NUMBER)]
RAGGED = [range(0, 10), range(10, 11), range(11, 27)]


@pytest.mark.parametrize(("parts", "shared"), [(WHOLE, False), (WHOLE, True), (SINGLE, False), (RAGGED, True)])
@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_the_gradient_is_that_of_the_expected_reward(
    model: Any, importance: str, parts: list[Any], shared: bool
) -> None:
    module = PolicyLoss(model, config(importance=importance, kl={"place": "none"}))
    probabilities = chances(module)
    assert float(probabilities.sum().detach()) == pytest.approx(1, abs=1e-6)
    exact = torch.autograd.grad(probabilities @ torch.from_numpy(REWARDS), list(model.parameters()))
    # A mean over all answers, each weighted by its probability, is the expectation.
    weights = probabilities.detach().numpy() * NUMBER * (REWARDS - 0.3)  # any baseline changes nothing
    buffer = make(advantages=np.repeat(weights, LENGTHS), weights=np.ones(LENGTHS.sum()))
    found = gradients(module, batches(buffer, parts, shared=shared))
    assert distance([-each for each in found], exact) < 2e-6
    if importance == "sequence":  # an answer counts once, whatever its length
        value = sum(module(part).losses["policy_loss"].item() for part in batches(buffer, parts, shared=shared))
        assert value == pytest.approx(-weights.sum(), rel=1e-5)


def test_the_loss_k2_of_answers_has_the_gradient_of_their_divergence(model: Any) -> None:
    kl = {"place": "loss", "estimator": "k2", "level": "answer", "coef": 1.0}
    module = PolicyLoss(model, config(importance="none", kl=kl))
    reference = 1 / NUMBER
    probabilities = chances(module)
    divergence = (probabilities * (probabilities / reference).log()).sum()
    exact = torch.autograd.grad(divergence, list(model.parameters()))
    zeros = np.zeros(LENGTHS.sum())
    buffer = make(advantages=zeros, weights=zeros + 1, reference_logps=zeros - np.log(3))
    each = [gradients(module, batches(buffer, [[number]])) for number in range(NUMBER)]
    weights = probabilities.detach().tolist()
    found = [
        sum(weight * grads[place] for weight, grads in zip(weights, each, strict=True)) for place in range(len(exact))
    ]
    assert distance(found, exact) < 2e-6


def test_tokens_that_do_not_count_change_nothing(model: Any) -> None:
    module = PolicyLoss(model, config(importance="token", aggregation="answers", entropy_coef=0.1))
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=LENGTHS.sum()) for name in ("advantages", "reference_logps")}
    weights = np.ones(LENGTHS.sum())
    weights[:6] = 0  # the first two answers
    kept = gradients(module, batches(make(**columns, weights=weights), [range(2, NUMBER)]))
    assert distance(gradients(module, batches(make(**columns, weights=weights), WHOLE)), kept) < 1e-6
    (nothing,) = batches(make(**columns, weights=0 * weights), WHOLE)
    assert all(float(each.detach()) == 0.0 for each in module(nothing).losses.values())
    assert module.counts(nothing)["sequences"] == 0
    (everything,) = batches(make(**columns, weights=0 * weights + 1), WHOLE)
    found, all_ = module(nothing).metrics["entropy"], module(everything).metrics["entropy"]
    assert found == all_ and module.counts(nothing)["answer_tokens"] == LENGTHS.sum(), "it is that of the policy"


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(model: Any) -> None:
    module = PolicyLoss(model, config(entropy_coef=1.0, aggregation="tokens", kl={"place": "none"}))
    zeros = np.zeros(LENGTHS.sum())
    (batch,) = batches(make(advantages=zeros, weights=zeros + 1), WHOLE)
    found = gradients(module, [batch])
    total = torch.zeros((), dtype=torch.float64)
    for answer in ANSWERS:
        ids = torch.tensor([[*PROMPT, *answer]])
        logps = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        total = total - (logps.exp() * logps).sum()
    exact = torch.autograd.grad(-total / LENGTHS.sum(), list(model.parameters()))
    assert distance(found, exact) < 2e-6


def test_the_ratio_is_one_at_the_start_and_the_loss_is_minus_the_advantage(model: Any) -> None:
    module = PolicyLoss(model, config(importance="token", clip="ppo", aggregation="tokens", kl={"place": "none"}))
    advantages = np.random.default_rng(1).normal(size=LENGTHS.sum())
    (batch,) = batches(make(advantages=advantages, weights=np.ones(LENGTHS.sum())), WHOLE)
    with torch.no_grad():
        old = module.evaluate(batch)["logps"].numpy()
        buffer = make(advantages=advantages, weights=np.ones(LENGTHS.sum()), old_logps=old)
        (batch,) = batches(buffer, WHOLE)
        assert module.largest_deviation(batch) < 1e-6  # stored in float32
        found = float(module(batch).losses["policy_loss"])
    assert found == pytest.approx(-advantages.sum(), rel=1e-5)
    assert module.start_sums(batch)["policy_loss"] == pytest.approx(-advantages.sum(), rel=1e-5)


def test_the_temperature_divides_the_logits(model: Any) -> None:
    (batch,) = batches(make(), WHOLE)
    with torch.no_grad():
        one, warm = (
            PolicyLoss(model, config(rollout={"temperature": temperature})).evaluate(batch)
            for temperature in (1.0, 2.0)
        )
        logits = torch.cat(
            [model(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1] for answer in ANSWERS]
        )
        expected = (logits / 2).log_softmax(-1).gather(1, torch.tensor(ANSWERS).flatten()[:, None])[:, 0]
    torch.testing.assert_close(warm["logps"], expected, rtol=1e-6, atol=1e-6)
    assert float((one["logps"] - warm["logps"]).abs().max()) > 1e-3
