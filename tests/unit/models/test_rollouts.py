"""Rollouts: sampled answers with log-probabilities, which depend on nothing but weights, prompt and counters."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from ingle import models
from ingle.errors import ModelError
from ingle.kernels.layers.logits import LogitTransform, score
from ingle.kernels.layers.sampling import draw, race
from ingle.models import Request, Rollout, Sampling, make_sampler, noise_keys
from ingle.models.generation import slots as slots_module
from ingle.models.generation.batch_sampler import BatchSampler

PROMPTS = [[5, 6, 7], [9], [4, 8, 15, 16, 23], [10, 11, 12]]
REQUESTS = [Request(draw, answer, prompt, 9) for draw, prompt in enumerate(PROMPTS) for answer in range(3)]


@pytest.fixture
def endless(model):
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None
    return model


@pytest.fixture
def plain(tokenizer):
    tokenizer.eos_token = None
    return tokenizer


@pytest.fixture(params=[BatchSampler, make_sampler], ids=["batches", "slots"])
def make(request, endless, plain):
    def make(**options: Any):
        return request.param(endless, plain, Sampling(**{"num_slots": 5, "prefill_tokens": 7, **options}))

    return make


def run(sampler, requests=REQUESTS, stop=lambda: False) -> list[Rollout]:
    found = {(each.draw, each.answer): each for each in sampler.run(requests, stop=stop)}
    assert set(found) == {(each.draw, each.answer) for each in requests}
    return [found[request.draw, request.answer] for request in requests]


def require_same(ours: Rollout, theirs: Rollout) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_greedy_rollouts_are_those_of_generate(make, endless, plain) -> None:
    expected = models.generate(endless, plain, PROMPTS, max_new_tokens=9)
    for request, rollout in zip(REQUESTS, run(make(temperature=0.0)), strict=True):
        assert tuple(rollout.ids) == expected[request.draw].token_ids and rollout.status == "length"


def test_figures_are_those_of_the_distribution_at_the_temperature(make, endless) -> None:
    for request, rollout in zip(REQUESTS, run(make(temperature=0.7)), strict=True):
        ids = torch.tensor([[*request.prompt, *rollout.ids]])
        with torch.no_grad():
            logits = endless(input_ids=ids).logits[0, len(request.prompt) - 1 : -1]
        logps = (logits / 0.7).log_softmax(-1)
        chosen = logps.gather(1, torch.tensor(rollout.ids.astype(int))[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logps, chosen, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rollout.entropies, -(logps.exp() * logps).sum(-1), rtol=1e-4)


def test_a_rollout_depends_on_nothing_but_its_own_text(endless, plain) -> None:
    def sample(requests=REQUESTS, **options) -> list[Rollout]:
        options = {"num_slots": 16, "prefill_tokens": 16, **options}
        return run(make_sampler(endless, plain, Sampling(**options)), requests)

    expected = sample()
    assert len({tuple(rollout.ids) for rollout in expected}) == len(expected), "answers must vary"
    for order in (list(reversed(REQUESTS)), REQUESTS[::2], REQUESTS[4:5]):
        for request, found in zip(order, sample(order), strict=True):
            require_same(found, expected[REQUESTS.index(request)])
    for num_slots in (1, 2):
        for found, wanted in zip(sample(REQUESTS[:3], num_slots=num_slots), expected, strict=False):
            assert found.ids.tolist() == wanted.ids.tolist()
            np.testing.assert_allclose(found.logps, wanted.logps, rtol=1e-5)
    assert all((ours.ids != theirs.ids).any() for ours, theirs in zip(sample(seed=1), expected, strict=True))


def test_slots_are_used_again_and_prompts_are_read_once(endless, plain, monkeypatch) -> None:
    passes: list[Any] = []
    original = slots_module._pass
    monkeypatch.setattr(slots_module, "_pass", lambda *columns: passes.append(columns) or original(*columns))
    sampler = make_sampler(endless, plain, Sampling(num_slots=4, prefill_tokens=8))
    assert sampler.is_invariant and sampler.note is None
    passes.clear()
    requests = [Request(0, answer, PROMPTS[2], 3 + 4 * (answer % 2)) for answer in range(12)]
    found = run(sampler, requests)
    assert [len(each.ids) for each in found] == [3, 7] * 6
    prompts, tokens = ([each for each in passes if len(each[0]) == size] for size in (8, 4))
    assert len(prompts) == 1 and prompts[0][0].tolist() == [*PROMPTS[2][:-1], 0, 0, 0, 0]
    ends = [0] * 4
    for request in requests:
        heapq.heapreplace(ends, ends[0] + request.max_new_tokens)
    assert len(tokens) == max(ends), "a slot was empty while an answer waited"


def test_how_answers_end(make, endless, plain) -> None:
    free = run(make(), REQUESTS[:1])[0]
    end = int(free.ids[4])
    assert end not in free.ids[:4]
    text = plain.decode(free.ids.tolist(), skip_special_tokens=True)
    stopped = run(make(stop=(text[2:4],)), REQUESTS[:1])[0]
    assert stopped.status == "string" and 2 < len(stopped.ids) < 9
    np.testing.assert_array_equal(stopped.ids, free.ids[: len(stopped.ids)])
    endless.generation_config.eos_token_id = end
    ended = run(make(), REQUESTS[:1])[0]
    assert ended.status == "stop"
    np.testing.assert_array_equal(ended.ids, free.ids[:5])
    np.testing.assert_array_equal(ended.logps, free.logps[:5])


def test_an_answer_ends_with_the_context(model, plain, make) -> None:
    requests = [Request(0, 0, [5] * 60, 30), Request(1, 0, [5] * 10, 30)]
    assert [(len(each.ids), each.status) for each in run(make(), requests)] == [(4, "context"), (30, "length")]
    with pytest.raises(ModelError, match="longer than the model's context"):
        run(make(), [Request(0, 0, [5] * 64, 1)])


def test_begun_answers_go_on_as_if_they_had_been_drawn(make) -> None:
    whole = run(make())
    begun = [request._replace(begun=each.ids[:4].tolist()) for request, each in zip(REQUESTS, whole, strict=True)]
    for ours, theirs in zip(run(make(), begun), whole, strict=True):
        require_same(ours, theirs)
    other = run(make(), [REQUESTS[0]._replace(begun=[3])])[0]
    assert other.ids[0] == 3 and len(other.ids) == 9


def test_it_stops_after_a_token_and_restores_the_model(make, endless) -> None:
    calls: list[int] = []
    endless.train()
    sampler = make()
    assert list(sampler.run(REQUESTS, stop=lambda: len(calls) >= 3 or bool(calls.append(0)))) == []
    assert endless.training and torch.is_grad_enabled()
    for _ in sampler.run(REQUESTS, stop=lambda: False):
        assert torch.is_grad_enabled(), "code between two answers runs without gradients"
    assert endless.training


def test_tokens_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.3, 0.15])
    count = 20_000
    logits = (probabilities.log() * 0.5).repeat(count, 1)
    keys = noise_keys(3, np.arange(count) % 50, np.arange(count) // 50, 7)
    assert len(np.unique(keys)) == count
    transform = LogitTransform().at(0.5)
    for kept, top_p in ((probabilities, 1.0), (torch.tensor([0.0, 0.625, 0.375, 0.0]), 0.7)):
        drawn = draw(logits, keys, transform, top_p=top_p)
        counts = np.bincount(drawn.tokens.numpy(), minlength=4)
        chi_square = ((counts - count * kept.numpy()) ** 2)[kept > 0] / (count * kept.numpy()[kept > 0])
        assert counts[kept == 0].sum() == 0 and chi_square.sum() < 16.3  # the quantile .999 of three degrees of freedom
        torch.testing.assert_close(drawn.logps, kept.log()[drawn.tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 4.0).at(0.7)], ids=["plain", "softcap"])
def test_a_race_is_that_of_all_logarithms(dtype, transform) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(300, 257, generator=generator) * 4).to(dtype)
    keys = noise_keys(0, np.arange(300), 0, 0)
    tokens = race(logits, keys, transform)
    assert torch.equal(tokens, race(logits.double(), keys, transform)), "the kernel and its reference"
    assert torch.equal(draw(logits, keys, transform).logps, score(logits, tokens, transform))
