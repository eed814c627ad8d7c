"""Generation: what ends an answer, sampling, and independence of the other prompts of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ingle import models
from ingle.errors import ModelError
from ingle.models.generation.stop_criteria import Answer, StopCriteria
from ingle.models.generation.token_sampler import TokenSampler

PROMPTS = [[5, 6, 7], [9], [4, 8, 15, 16, 23], [10, 11, 12]]


@pytest.fixture
def endless(model: PreTrainedModel) -> PreTrainedModel:
    """The model without end tokens, so that answers reach their maximum length."""
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None
    return model


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.eos_token = None
    return tokenizer


def test_answers_do_not_depend_on_the_batch(endless, plain) -> None:
    together = models.generate(endless, plain, PROMPTS, max_new_tokens=12)
    for size in (1, 3):
        assert models.generate(endless, plain, PROMPTS, max_new_tokens=12, batch_size=size) == together
    assert [len(answer.token_ids) for answer in together] == [12] * 4
    assert {answer.finish_reason for answer in together} == {"length"}


def test_greedy_answers_take_the_most_likely_tokens(endless, plain) -> None:
    for prompt, answer in zip(PROMPTS, models.generate(endless, plain, PROMPTS, max_new_tokens=6), strict=True):
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            likeliest = endless(input_ids=ids).logits[0].argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == list(answer.token_ids)


def test_sampling_depends_on_seed_and_index_alone(endless, plain) -> None:
    def sample(**options: object):
        return models.generate(endless, plain, PROMPTS, max_new_tokens=10, temperature=1.5, **options)

    first = sample(seed=1, batch_size=4)
    torch.manual_seed(0)
    assert sample(seed=1, batch_size=1) == first
    assert sample(seed=2) != first
    same = models.generate(endless, plain, [PROMPTS[0]] * 2, max_new_tokens=10, temperature=1.5, seed=1)
    assert same[0] == first[0] and same[1] != first[0]


def test_samples_follow_the_probabilities_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(20_000, 1)[:, [2, 0, 3, 1]]
    rows = list(range(len(logits)))

    def counts(top_p: float) -> np.ndarray:
        tokens = TokenSampler(1.0, top_p, 7, rows).choose(logits, rows)
        return np.bincount(tokens.numpy(), minlength=4) / len(rows)

    np.testing.assert_allclose(counts(1.0), [0.15, 0.5, 0.1, 0.25], atol=0.015)
    np.testing.assert_allclose(counts(0.7), [0, 2 / 3, 0, 1 / 3], atol=0.015)
    np.testing.assert_allclose(counts(0.76), [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9], atol=0.015)
    np.testing.assert_array_equal(counts(1e-9), [0, 1, 0, 0])


def test_temperature_flattens() -> None:
    logits = torch.tensor([[2.0, 0.0]]).repeat(20_000, 1)
    rows = list(range(len(logits)))
    share = TokenSampler(2.0, 1.0, 0, rows).choose(logits, rows).float().mean().item()
    assert share == pytest.approx(1 / (1 + np.e), abs=0.015)


def test_every_end_token_ends_an_answer_and_is_not_part_of_it(endless, plain) -> None:
    free = models.generate(endless, plain, PROMPTS[:1], max_new_tokens=12)[0].token_ids
    end = free[4]
    expected = free[: free.index(end)]
    endless.generation_config.eos_token_id = [31, end]
    together = models.generate(endless, plain, PROMPTS, max_new_tokens=12)
    assert together[0].token_ids == expected and together[0].finish_reason == "stop"
    assert len({len(answer.token_ids) for answer in together}) > 1, "answers must end at different steps"
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert models.generate(endless, plain, [prompt], max_new_tokens=12) == [answer]


def test_end_tokens_come_from_model_tokenizer_and_template(model, tokenizer) -> None:
    model.generation_config.eos_token_id = [5, 6]
    model.config.eos_token_id = 7
    assert models.end_token_ids(model, tokenizer) == {2, 5, 6, 7}
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}<end>{% endfor %}"
    assert models.end_token_ids(model, tokenizer) == {2, 3, 5, 6, 7}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}a{% endfor %}"
    assert models.end_token_ids(model, tokenizer) == {2, 5, 6, 7}, "an ordinary token does not end an answer"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert models.end_token_ids(model, tokenizer) == {2, 5, 6, 7}
    tokenizer.chat_template = "{{ 10 ** 10 ** 10 }}"  # runs under the limits of data preparation
    with pytest.raises(ModelError, match="chat template"):
        models.end_token_ids(model, tokenizer)


def test_a_stop_string_ends_and_is_cut_off(endless, plain) -> None:
    text = models.generate(endless, plain, PROMPTS[2:3], max_new_tokens=20)[0].text
    stop = text[6:9]
    expected = text[: text.index(stop)]
    answer = models.generate(endless, plain, PROMPTS[2:3], max_new_tokens=20, stop=["0", stop])[0]
    assert answer.text == expected and answer.finish_reason == "stop"
    assert stop in plain.decode(answer.token_ids, skip_special_tokens=True)
    assert stop not in plain.decode(answer.token_ids[:-1], skip_special_tokens=True), (
        "the answer continued after the stop string"
    )


def test_the_pieces_of_a_stream_are_the_answer(endless, plain) -> None:
    for stop in ((), ("zzz",)):
        for prompt in PROMPTS:
            options = {"max_new_tokens": 15, "temperature": 1.0, "seed": 4, "stop": stop}
            whole = models.generate(endless, plain, [prompt], **options)[0]
            returned = []

            def collect(stream, returned=returned):
                returned.append((yield from stream))

            pieces = list(collect(models.stream(endless, plain, prompt, **options)))
            assert "".join(pieces) == whole.text and len(pieces) > 5
            assert returned == [whole]


def test_a_stream_yields_no_part_of_a_stop_string(endless, plain) -> None:
    text = models.generate(endless, plain, PROMPTS[2:3], max_new_tokens=20)[0].text
    stop = text[6:10]
    pieces = list(models.stream(endless, plain, PROMPTS[2], max_new_tokens=20, stop=[stop]))
    assert "".join(pieces) == text[: text.index(stop)]


def test_an_incomplete_character_is_not_yielded() -> None:
    class Bytes:
        """Token i is the byte i."""

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return bytes(ids).decode(errors="replace")

    answer = Answer(StopCriteria(Bytes(), ("é!",), frozenset()))
    settled = []
    for byte in "aé?é!".encode():
        over = answer.add(byte)
        settled.append(answer.settled())
    assert settled[:4] == ["a", "a", "a", "aé?"] and over
    assert answer.finish().text == "aé?"


def test_an_answer_ends_with_the_context(model, plain) -> None:
    model.generation_config, model.config.eos_token_id = GenerationConfig(), None
    prompts = [[5] * 60, [5] * 10]
    answers = models.generate(model, plain, prompts, max_new_tokens=30)
    assert [len(answer.token_ids) for answer in answers] == [4, 30]
    with pytest.raises(ModelError, match="longer than the model's context"):
        models.generate(model, plain, [[5] * 64], max_new_tokens=1)
    with pytest.raises(ModelError, match="no tokens") as caught:
        models.generate(model, plain, [[5], []], max_new_tokens=1)
    assert caught.value.where == "prompt 2 of 2"


def test_a_prompt_that_is_too_long_is_refused_before_any_is_answered(model, plain) -> None:
    counted: list[tuple[int, int]] = []
    with pytest.raises(ModelError, match="longer than the model's context") as caught:
        models.generate(
            model,
            plain,
            [[5], [5] * 64],
            max_new_tokens=1,
            batch_size=1,
            on_progress=lambda *counts: counted.append(counts),
        )
    assert counted == [] and caught.value.where == "prompt 2 of 2" and "64" in str(caught.value.why)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1.0])
def test_extreme_temperatures_are_stable(temperature: float) -> None:
    sampler = TokenSampler(temperature, 1.0, 0, [0, 1])
    logits = torch.tensor([[0.0, 100.0, 0.0], [100.0, 0.0, 0.0]])
    assert [sampler.choose(logits, [0, 1]).tolist() for _ in range(3)] == [[1, 0]] * 3


def test_progress_and_mode(endless, plain) -> None:
    counted: list[tuple[int, int]] = []
    endless.train()
    endless.model.layers[0].eval()
    models.generate(
        endless, plain, PROMPTS, max_new_tokens=2, batch_size=3, on_progress=lambda *counts: counted.append(counts)
    )
    assert counted == [(3, 4), (4, 4)]
    assert endless.training and not endless.model.layers[0].training
    assert models.generate(endless, plain, [], max_new_tokens=2) == []
