"""Rollouts: sampled answers with log-probabilities, which depend on nothing but weights, prompt and counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from ingle import models
from ingle.models import Request, Sampling
from ingle.models.generation.batch_sampler import BatchSampler
from ingle.models.generation.sampler import make_sampler

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


@pytest.fixture(params=[BatchSampler, make_sampler])
def make(request, endless, plain):
    return lambda **options: request.param(endless, plain, Sampling(**options))


def run(sampler, requests=REQUESTS, stop=lambda: False):
    found = {(each.draw, each.answer): each for each in sampler.run(requests, stop=stop)}
    return [found.get((request.draw, request.answer)) for request in requests]


def test_greedy_rollouts_are_those_of_generate(make, endless, plain) -> None:
    expected = models.generate(endless, plain, PROMPTS, max_new_tokens=9)
    for request, rollout in zip(REQUESTS, run(make(temperature=0.0, num_slots=5)), strict=True):
        assert tuple(rollout.ids) == expected[request.draw].token_ids and rollout.status == "length"


def test_figures_are_those_of_the_distribution_at_the_temperature(make, endless) -> None:
    for request, rollout in zip(REQUESTS, run(make(temperature=0.7, num_slots=5)), strict=True):
        ids = torch.tensor([[*request.prompt, *rollout.ids]])
        with torch.no_grad():
            logits = endless(input_ids=ids).logits[0, len(request.prompt) - 1 : -1]
        logps = (logits / 0.7).log_softmax(-1)
        chosen = logps.gather(1, torch.tensor(rollout.ids.astype(int))[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logps, chosen, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rollout.entropies, -(logps.exp() * logps).sum(-1), rtol=1e-4)


def test_a_rollout_depends_on_nothing_but_its_own_text(endless, plain) -> None:
    def sample(requests=REQUESTS, **options):
        return run(
            make_sampler(endless, plain, Sampling(**{"num_slots": 16, "prefill_tokens": 16, **options})), requests
        )

    expected = sample()
    assert len({tuple(rollout.ids) for rollout in expected}) == len(expected), "answers must vary"
    for order in (list(reversed(REQUESTS)), REQUESTS[::2], REQUESTS[4:5]):
        for request, found in zip(order, sample(order), strict=True):
            wanted = expected[REQUESTS.index(request)]
            for ours, theirs in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert all((ours.ids != theirs.ids).any() for ours, theirs in zip(sample(seed=1), expected, strict=True))
