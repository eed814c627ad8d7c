"""Distillation: divergences from a teacher of another size, and teachers that are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, LlamaConfig

from ingle.config.policy import Distill, RolloutConfig
from ingle.data.batch import Batch, collate, round_up
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.errors import ModelError
from ingle.objectives.distill import DivergenceLoss
from ingle.objectives.policy_losses import divergence
from tests.tiny import SIZES, make_random


def batch(*, adds: bool = True) -> Batch:
    generator, samples = np.random.default_rng(0), []
    for length, prompt in ((12, 5), (7, 2), (20, 9)):
        ids = generator.integers(0, 60, length).astype(np.int32)
        labels = np.where(np.arange(length) < prompt, IGNORE_INDEX, ids).astype(np.int32)
        samples.append(Sample(ids, labels))
    return round_up(collate(samples)) if adds else collate(samples)


def loss(beta: float, temperature: float = 1.0, *, teacher_tokens: int = 64) -> tuple[DivergenceLoss, Any, Any]:
    student = make_random(LlamaConfig(**SIZES), torch.float32)
    sizes = {**SIZES, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": teacher_tokens}
    teacher = make_random(LlamaConfig(**sizes), torch.float32, std=0.3)
    module = DivergenceLoss(student, section(beta, temperature), vocabulary(a=0, b=1))
    module.load_parts(None, lambda path: SimpleNamespace(model=teacher, tokenizer=vocabulary(a=0, b=1)))
    return module, student, teacher


def section(beta: float, temperature: float = 1.0) -> Distill:
    return Distill(kind="distill", teacher="t", beta=beta, rollout=RolloutConfig(temperature=temperature))


def vocabulary(**tokens: int) -> Any:
    return SimpleNamespace(get_vocab=lambda: tokens)


@pytest.mark.parametrize(("beta", "temperature", "tokens"), [(0.0, 1.0, 64), (0.5, 0.7, 64), (1.0, 1.0, 80)])
def test_the_loss_is_the_divergence_at_supervised_tokens(beta: float, temperature: float, tokens: int) -> None:
    module, student, teacher = loss(beta, temperature, teacher_tokens=tokens)
    whole, start = batch(adds=False), 0
    expected, documents = torch.zeros(()), []
    for stop in whole.cu_seqlens[1:].tolist():
        ids = whole.input_ids[:, start:stop]
        logps = [(model(ids).logits[0, :, :64] / temperature).log_softmax(-1) for model in (student, teacher)]
        counted = whole.labels[0, start + 1 : stop] != IGNORE_INDEX
        values = divergence(logps[0], logps[1], beta)[:-1][counted]
        documents.append((float(values.detach().sum()), float(counted.sum())))
        expected, start = expected + values.sum(), stop
    found = module(batch()).losses["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value, list(student.parameters())) for value in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert module.counts(batch()) == {"completion_tokens": sum(count for _, count in documents)}
    with torch.no_grad():
        per_document = module.per_document(batch())
    torch.testing.assert_close(per_document, torch.tensor(documents, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_the_teacher_is_neither_trained_nor_part_of_the_module() -> None:
    module, student, teacher = loss(1.0)
    module.train()
    module(batch()).losses["loss"].backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}


def test_teachers_that_do_not_fit() -> None:
    module = DivergenceLoss(make_random(LlamaConfig(**SIZES), torch.float32), section(1.0), vocabulary(a=0, b=1))
    other = make_random(LlamaConfig(**SIZES), torch.float32)
    with pytest.raises(ModelError, match="another vocabulary"):
        module.load_parts(None, lambda path: SimpleNamespace(model=other, tokenizer=vocabulary(a=0, c=1)))
    encoder = SimpleNamespace(config=BertConfig())
    with pytest.raises(ModelError, match="no causal language model"):
        module.load_parts(None, lambda path: SimpleNamespace(model=encoder, tokenizer=vocabulary(a=0, b=1)))
