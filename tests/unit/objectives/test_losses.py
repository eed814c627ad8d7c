"""The loss of each objective equals that of transformers' own heads, document by document, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from ingle.data.batch import Batch, collate, round_up
from ingle.data.corruption import Target
from ingle.data.counters import Place
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.models import ModelTask, forward_task
from ingle.models.forward.layout import Layout
from ingle.objectives import AnswerLoss, ClassLoss, DocumentLoss, MaskedTokenLoss, TagLoss, TargetLoss, token_loss
from ingle.objectives.classify import ClassWeights, balanced_weights
from ingle.objectives.dealing import start_without_labels
from ingle.objectives.seq2seq import Joining, target_of

LENGTHS = (5, 9, 5, 12)
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    **_NO_DROPOUT,
}  # fmt: skip
T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip


class Case(NamedTuple):
    """One objective over one model.

    Attributes:
        build: Makes the model.
        loss: Makes the loss of the model.
        columns: Makes the columns of a document of a length; those of ``labels`` replace the labels.
        expected: Returns the sum of the losses of a document by transformers, and its count.
    """

    build: Callable[[], Any]
    loss: Callable[[Any], DocumentLoss]
    columns: Callable[[np.random.Generator, int], Mapping[str, Any]]
    expected: Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, float]]


def _some(rng: np.random.Generator, length: int, high: int) -> Any:
    return np.where(rng.random(length) < 0.6, rng.integers(0, high, length), IGNORE_INDEX)


def _by_token(model: Any, column: Mapping[str, Tensor], name: str) -> tuple[Tensor, float]:
    count = float((column[name] != IGNORE_INDEX).sum())
    loss = model(column["input_ids"], labels=column[name]).loss if count else torch.zeros((), dtype=torch.float64)
    return loss * count, count


def _by_target(model: Any, column: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    labels = column["decoder_labels"]
    return model(column["input_ids"], labels=labels).loss * labels.numel(), float(labels.numel())


def _by_class(model: Any, column: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    labels = column["document_labels"]
    single = model.config.problem_type == "single_label_classification"
    loss = model(column["input_ids"], labels=labels.long() if single else labels.double()).loss
    outputs = labels.numel()
    return loss * outputs, float(outputs)


def _by_window(model: Any, column: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    sides = {f"{side}_positions": column[f"{side}_labels"] for side in ("start", "end")}
    return model(column["input_ids"], **sides).loss, 1.0


def _classifier(kind: type[Any], sizes: Mapping[str, Any], problem: str, num_labels: int) -> Callable[[], Any]:
    return lambda: kind(kind.config_class(**sizes, num_labels=num_labels, problem_type=problem))


_BertClass = transformers.BertForSequenceClassification
CASES = {
    "mlm": Case(
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        MaskedTokenLoss,
        lambda rng, n: {"labels": _some(rng, n, 50)},
        lambda model, column: _by_token(model, column, "labels"),
    ),
    "seq2seq": Case(
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        TargetLoss,
        lambda rng, n: dict(Target(0).sample(np.zeros(1), rng.integers(1, 50, n // 2)).columns),
        _by_target,
    ),
    "classify, single": Case(
        _classifier(_BertClass, BERT, "single_label_classification", 3),
        lambda model: ClassLoss(model, "single"),
        lambda rng, n: {"document_labels": rng.integers(0, 3, 1)},
        _by_class,
    ),
    "classify, multi": Case(
        _classifier(_BertClass, BERT, "multi_label_classification", 3),
        lambda model: ClassLoss(model, "multi"),
        lambda rng, n: {"document_labels": rng.integers(0, 2, (1, 3))},
        _by_class,
    ),
    "classify, regression": Case(
        _classifier(_BertClass, BERT, "regression", 1),
        lambda model: ClassLoss(model, "regression"),
        lambda rng, n: {"document_labels": rng.random(1)},
        _by_class,
    ),
    "classify, causal": Case(
        _classifier(transformers.LlamaForSequenceClassification, LLAMA, "single_label_classification", 3),
        lambda model: ClassLoss(model, "single"),
        lambda rng, n: {"document_labels": rng.integers(0, 3, 1)},
        _by_class,
    ),
    "tag": Case(
        lambda: transformers.BertForTokenClassification(transformers.BertConfig(**BERT, num_labels=4)),
        TagLoss,
        lambda rng, n: {"token_labels": _some(rng, n, 4)},
        lambda model, column: _by_token(model, column, "token_labels"),
    ),
    "answer": Case(
        lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**BERT)),
        AnswerLoss,
        lambda rng, n: {"start_labels": rng.integers(0, n, 1), "end_labels": rng.integers(0, n, 1)},
        _by_window,
    ),
}


def make_samples(case: Case) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for length in LENGTHS:
        ids = rng.integers(1, 50, length).astype(np.int32)
        columns = dict(case.columns(rng, length))
        labels = columns.pop("labels", np.full(length, IGNORE_INDEX)).astype(np.int32)
        samples.append(Sample(ids, labels, columns))
    return samples


def make_loss(case: Case) -> DocumentLoss:
    torch.manual_seed(0)
    model = case.build().double().eval()
    model.packed_layout = Layout("equal_rows")  # as transformers built it
    if "ForSequenceClassification" in type(model).__name__:
        model.packed_task = ModelTask("classify")
    return case.loss(model)


def run_document_by_document(model: Any, batch: Batch) -> Tensor:
    """What ``forward_hidden`` promises: the input of the output layer, here with a call per document."""
    found: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    decodes = "decoder_input_ids" in batch.columns
    for k in range(len(batch.cu_seqlens) - 1):
        first, last = batch.cu_seqlens[k : k + 2].tolist()
        inputs = {"input_ids": batch.input_ids[:, first:last]}
        if decodes:
            first, last = batch.columns["decoder_cu_seqlens"][k : k + 2].tolist()
            inputs["decoder_input_ids"] = batch.columns["decoder_input_ids"][:, first:last]
        model(**inputs)
    handle.remove()
    return torch.cat(found, 1)


@pytest.fixture(autouse=True)
def one_call_per_document(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(token_loss, "forward_hidden", run_document_by_document)
    monkeypatch.setattr(token_loss, "through_head", lambda model, function, *rest: function(_head(model), *rest))
    yield


def _head(model: Any) -> Any:
    from ingle.models import Head

    layer: nn.Linear = model.get_output_embeddings()
    return Head(layer.weight, layer.bias)


@pytest.mark.parametrize("name", CASES)
def test_sum_count_and_gradients_are_those_of_transformers(name: str) -> None:
    case = CASES[name]
    loss, samples = make_loss(case), make_samples(case)
    batch = round_up(collate(samples))
    total = loss(batch).losses["loss"]
    total.backward()
    gradients = {key: p.grad.clone() for key, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    by_document = [case.expected(loss.model, collate([sample]).columns) for sample in samples]
    expected = torch.stack([value for value, _ in by_document]).sum()
    expected.backward()
    assert loss.count(batch) == sum(count for _, count in by_document)
    torch.testing.assert_close(total.double(), expected, rtol=1e-9, atol=0)
    for key, parameter in loss.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-8, atol=1e-12)
    table_D2 = loss.per_document(batch)
    assert table_D2.dtype == torch.float64
    torch.testing.assert_close(
        table_D2, torch.tensor([[v.item(), n] for v, n in by_document]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", CASES)
def test_a_document_changes_the_loss_of_no_other(name: str) -> None:
    case = CASES[name]
    loss, samples = make_loss(case), make_samples(case)
    changed = [*samples]
    changed[1] = replace(samples[1], input_ids=samples[1].input_ids[::-1].copy())
    before, after = (loss.per_document(collate(each)) for each in (samples, changed))
    others = [0, 2, 3]
    assert before[others].equal(after[others])
    assert before[1, 0] != after[1, 0]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_without_documents_adds_an_exact_zero_to_every_gradient(name: str) -> None:
    case = CASES[name]
    loss = make_loss(case)
    batch = start_without_labels(make_samples(case)[3])
    total = loss(batch).losses["loss"]
    assert total.item() == 0 and loss.count(batch) == 0
    total.backward()
    assert all(not parameter.grad.any() for parameter in loss.parameters() if parameter.grad is not None)
    assert loss.per_document(batch).shape == (0, 2)


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_add_up(name: str) -> None:
    case = CASES[name]
    loss = make_loss(case)
    batch = round_up(collate(make_samples(case)))
    parts = [round_up(part) for part in batch.split(3)]
    assert len(parts) == 3 and sum(loss.count(part) for part in parts) == loss.count(batch)
    together = torch.cat([loss.per_document(part) for part in parts])
    torch.testing.assert_close(together, loss.per_document(batch), rtol=1e-9, atol=0)


def test_class_weights_are_those_of_cross_entropy() -> None:
    case = CASES["classify, single"]
    loss, samples = make_loss(case), make_samples(case)
    labels = np.array([sample.columns["document_labels"][0] for sample in samples])
    weights = balanced_weights(np.bincount(labels, minlength=3))
    assert np.isclose(weights[labels].mean(), 1)
    batch = round_up(collate(ClassWeights(weights)(samples, [Place(0, 0)] * 4)))
    logits_DC = forward_task(loss.model, batch)[:4]
    expected = nn.functional.cross_entropy(logits_DC, torch.from_numpy(labels), torch.from_numpy(weights))
    mean = loss(batch).losses["loss"] / loss.count(batch)
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    case = CASES["classify, single"]
    batch = collate(make_samples(case))
    model = make_loss(case).model
    expected = nn.functional.cross_entropy(
        forward_task(model, batch), batch.columns["document_labels"].long(), label_smoothing=0.3, reduction="sum"
    )
    torch.testing.assert_close(ClassLoss(model, "single", 0.3)(batch).losses["loss"], expected)


def test_a_source_is_joined_with_its_target() -> None:
    texts = [np.arange(1, n, dtype=np.int32) for n in (6, 4, 3, 9)]
    joined = Joining(Target(2))([Sample(text, text) for text in texts], [Place(0, i) for i in range(4)])
    assert [sample.input_ids.tolist() for sample in joined] == [texts[0].tolist(), texts[2].tolist()]
    assert joined[1].columns["decoder_labels"].tolist() == texts[3].tolist()
    assert joined[1].columns["decoder_input_ids"].tolist() == [2, *texts[3][:-1]]


def _encoder_decoder(kind: str, **options: Any) -> Any:
    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


_BART_SIZES = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("T5", T5 | {"decoder_start_token_id": None}, 0),  # the pad token
        ("T5", T5 | {"decoder_start_token_id": 3}, 3),
        ("Bart", _BART_SIZES, 2),
        ("MBart", _BART_SIZES, None),  # the language id, which ends the target
        ("Pegasus", _BART_SIZES, 0),
    ],
)
def test_the_decoder_begins_as_transformers_lets_it(kind: str, options: dict[str, Any], expected: int | None) -> None:
    target = target_of(_encoder_decoder(kind, **options))
    assert target == Target(expected)
