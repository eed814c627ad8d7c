"""Likelihoods against plain transformers in float64, and the runner on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ingle import adapters, models
from ingle.config import LoraAdapter, ModelConfig, Source, TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation import ModelSource, evaluate, read_task, run_task
from ingle.evaluation.run.likelihood import score_references
from ingle.events import Progress, Warned

CPU = torch.device("cpu")
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {n}?"},
            {"role": "assistant", "content": f"it is {'two ' * n}."},
        ]
    }
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_factory) -> tuple[Path, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_factory()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture()
def model(checkpoint):
    config = ModelConfig(id=str(checkpoint[0]))
    model = models.meta_model(config, CPU, torch.float32)
    models.load_weights(model, config, CPU, torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return LlamaForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float64).eval()


def task_of(tmp_path: Path, rows: list[dict], *metrics: str, **options) -> TaskConfig:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TaskConfig(sources=(Source(path=str(path)),), metrics=metrics or ("perplexity", "bits_per_byte"), **options)


@torch.no_grad()
def expected_nll(oracle, ids: list[int], first: int) -> float:
    logps = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logps[place - 1, ids[place]].item() for place in range(first, len(ids)))


def test_answers_are_scored_with_their_end_of_turn_given_the_prompt(tmp_path, model, oracle, checkpoint):
    tokenizer = checkpoint[1]
    samples = read_task(task_of(tmp_path, CHATS))
    found = score_references(model, tokenizer, samples)
    for sample, likelihood in zip(samples, found, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in sample.example.messages]
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        answer = f"{turns[1]['content']}<|im_end|>"
        ids, given = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
        assert likelihood.num_tokens == len(ids) - given
        assert likelihood.nll == pytest.approx(expected_nll(oracle, ids, given), rel=2e-5)
        assert likelihood.num_bytes == len(turns[1]["content"].encode())


def test_a_system_message_changes_the_likelihood(tmp_path, model, checkpoint):
    samples = read_task(task_of(tmp_path, CHATS[:2]))
    plain = score_references(model, checkpoint[1], samples)
    system = score_references(model, checkpoint[1], samples, system="name the price")
    assert plain[0].num_tokens == system[0].num_tokens and plain[0].nll != system[0].nll


def test_bytes_are_those_of_the_text_that_is_scored(tmp_path, model, checkpoint):
    (pair,) = read_task(task_of(tmp_path, [{"prompt": "hello", "completion": " café\n"}]))
    (found,) = score_references(model, checkpoint[1], [pair])
    assert found.num_bytes == len("café".encode())  # a template brings its own white space
    (chat,) = read_task(task_of(tmp_path, [{**CHATS[0], "references": ["other"]}]))
    assert score_references(model, checkpoint[1], [chat])[0].num_bytes == len(CHATS[0]["messages"][1]["content"])


def test_an_empty_answer_gives_way_to_the_next_reference(tmp_path, model, checkpoint):
    empty = {"messages": [*CHATS[0]["messages"][:1], {"role": "assistant", "content": ""}], "references": ["it is two"]}
    full = {"messages": [*CHATS[0]["messages"][:1], {"role": "assistant", "content": "it is two"}]}
    one, other = (score_references(model, checkpoint[1], read_task(task_of(tmp_path, [row]))) for row in (empty, full))
    assert one == other


def test_every_token_of_plain_text_is_scored_once(tmp_path, model, oracle, checkpoint):
    tokenizer = checkpoint[1]
    texts = ["hello world, café", "the lazy dog " * 40, "x"]  # the second is longer than the model's 64 tokens
    samples = read_task(task_of(tmp_path, [{"text": text} for text in texts]))
    found = score_references(model, tokenizer, samples)
    for text, likelihood in zip(texts, found, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        windows = [ids[start : start + 64] for start in range(0, len(ids) - 1, 63)]
        assert likelihood.num_tokens == len(ids) - 1
        assert likelihood.nll == pytest.approx(sum(expected_nll(oracle, window, 1) for window in windows), rel=2e-5)
        assert likelihood.num_bytes == len(text.encode())
    assert len(tokenizer(texts[1])["input_ids"]) > 64


def test_bits_per_byte_of_the_corpus(tmp_path, model, oracle, checkpoint):
    tokenizer = checkpoint[1]
    texts = ["hello world", "how are you today"]
    task = task_of(tmp_path, [{"text": text} for text in texts])
    (summary,) = evaluate(ModelSource(model, tokenizer), [task])
    ids = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in texts]
    nll = sum(expected_nll(oracle, one, 1) for one in ids)
    assert summary.metrics["bits_per_byte"].value == pytest.approx(nll / sum(map(len, texts)) / math.log(2), rel=2e-5)
    assert summary.metrics["perplexity"].value == pytest.approx(
        math.exp(nll / sum(len(one) - 1 for one in ids)), rel=1e-4
    )


def test_a_prompt_too_long_loses_its_start_with_a_warning(tmp_path, model, oracle, checkpoint):
    tokenizer, events = checkpoint[1], []
    row = {"prompt": "question hello " * 30, "completion": "it is four."}
    tokenizer.chat_template, template = None, tokenizer.chat_template
    try:
        task = task_of(tmp_path, [row], "perplexity")
        result = run_task(ModelSource(model, tokenizer), task, sink=events.append)
    finally:
        tokenizer.chat_template = template
    ids = [*tokenizer(row["prompt"].rstrip(" ") + " it is four.")["input_ids"], tokenizer.eos_token_id]
    (likelihood,) = result.outputs.likelihoods
    assert any(isinstance(event, Warned) and "cut at the start" in event.message for event in events)
    assert likelihood.nll == pytest.approx(expected_nll(oracle, ids[-64:], 64 - likelihood.num_tokens), rel=2e-5)
    assert 3 <= likelihood.num_tokens < 20


def test_base_and_tuned_are_compared_and_the_base_is_the_model_without_its_adapter(tmp_path, model, checkpoint):
    tokenizer, events = checkpoint[1], []
    task = task_of(tmp_path, CHATS, "chrf", "exact_match", "perplexity", max_new_tokens=6)
    alone = run_task(ModelSource(model, tokenizer), task)
    adapters.attach(model, LoraAdapter(rank=4), seed=0)
    for name, parameter in adapters.trainable_parameters(model):
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned = ModelSource(model, tokenizer, "tuned")
    (comparison,) = evaluate(tuned, [task], base=tuned.base(), sink=events.append)
    assert [sample.base for sample in comparison.samples] == list(alone.outputs.answers)
    assert any(sample.base != sample.tuned for sample in comparison.samples)
    assert comparison.metrics["perplexity"].base == pytest.approx(
        math.exp(sum(x.nll for x in alone.outputs.likelihoods) / sum(x.num_tokens for x in alone.outputs.likelihoods)),
        rel=1e-6,
    )
    stages = {event.stage for event in events if isinstance(event, Progress)}
    assert stages == {f"{what} ({side})" for side in ("base", "tuned") for what in ("Answering", "Scoring references")}
    ends = [event for event in events if isinstance(event, Progress) and event.done == event.total]
    assert {event.stage for event in ends} == stages


def test_a_result_given_for_the_base_is_used(tmp_path, model, checkpoint):
    task = task_of(tmp_path, CHATS[:3], "perplexity")
    kept = run_task(ModelSource(model, checkpoint[1]), task)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    (comparison,) = evaluate(ModelSource(model, checkpoint[1]), [task], base=[kept])
    assert comparison.metrics["perplexity"].delta != 0


def test_cut_answers_give_a_warning(tmp_path, model, checkpoint):
    events = []
    result = run_task(
        ModelSource(model, checkpoint[1]), task_of(tmp_path, CHATS, "chrf", max_new_tokens=2), sink=events.append
    )
    assert result.num_unfinished > 0
    assert any(isinstance(event, Warned) and "cut off at 2 tokens" in event.message for event in events)


def test_a_prompt_the_model_cannot_hold_is_named(tmp_path, model, checkpoint):
    long = [{"role": "user", "content": "question hello " * 60}, {"role": "assistant", "content": "x"}]
    rows = [CHATS[0], {"messages": long}]
    with pytest.raises(EvaluationError) as error:
        run_task(ModelSource(model, checkpoint[1]), task_of(tmp_path, rows, "chrf"))
    assert error.value.where.endswith("task.jsonl:2")


def test_the_mode_of_the_model_is_left_as_it_was(tmp_path, model, checkpoint):
    model.train()
    run_task(ModelSource(model, checkpoint[1]), task_of(tmp_path, CHATS[:2], "perplexity"))
    assert model.training
