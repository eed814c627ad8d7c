"""Task heads over packed documents compute what transformers computes for each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from ingle import adapters, models
from ingle.config import LoraAdapter, ModelConfig
from ingle.config.objective import Classify
from ingle.data.batch import collate, round_up
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.errors import ModelError
from ingle.models import ModelTask, keep_stored_labels
from ingle.models.kinds import new_model
from ingle.models.loading.layout_choice import enliven
from ingle.objectives import AnswerLoss, ClassLoss, DocumentLoss, TagLoss
from ingle.objectives.dealing import start_without_labels
from tests.conftest import make_tokenizer
from tests.contract.models.tiny_types import small_config

LENGTHS = (5, 17, 9, 2, 12)
LABELS = ("negative", "neutral", "positive")
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
TASKS = {
    "single": ModelTask("classify", LABELS, SINGLE),
    "multi": ModelTask("classify", LABELS, MULTI),
    "regression": ModelTask("classify", (), REGRESSION),
    "tag": ModelTask("tag", LABELS),
    "answer": ModelTask("answer"),
}
#: Every kind of task on a decoder, an encoder and an encoder-decoder; one task on each other way to pool a text.
CASES = [
    *(("llama", name) for name in TASKS),
    *(("bert", name) for name in ("single", "tag", "answer")),
    *(("bart", name) for name in ("single", "answer")),
    *((kind, "single") for kind in ("gpt2", "roberta", "modernbert", "albert")),
    *(
        pytest.param(kind, name, marks=pytest.mark.sweep)
        for kind, name in (
            ("bert", "multi"),
            ("bert", "regression"),
            ("distilbert", "single"),
            ("deberta-v2", "single"),
            ("t5", "single"),
            ("t5", "tag"),
            ("gpt2", "tag"),
            ("qwen3", "answer"),
        )
    ),
]
ROUND_TRIPS = [("llama", "single"), ("gpt2", "tag"), ("bert", "single"), ("distilbert", "answer"), ("bart", "single")]
#: Models whose head is trained without adapters, too: a head of one layer, and one with a pooler.
HEADS_ALONE = [("llama", "single"), ("bert", "single")]
_EOS, _PAD = 2, 1


def build(kind: str, task: ModelTask) -> Any:
    """A model of transformers with large random weights; its own head reads the labels of the task."""
    config = small_config(kind)
    task.describe_in(config)
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = _PAD, _EOS, 0
    auto = {
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
        "answer": transformers.AutoModelForQuestionAnswering,
    }[task.kind]
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    enliven(model)
    return model.eval()


def make_samples(task: ModelTask) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for length in LENGTHS:
        ids = rng.integers(3, 60, length).astype(np.int32)
        ids[-1] = _EOS
        columns: dict[str, Any] = {
            SINGLE: {"document_labels": rng.integers(0, 3, 1)},
            MULTI: {"document_labels": rng.integers(0, 2, (1, 3))},
            REGRESSION: {"document_labels": rng.random(1)},
        }.get(task.problem or "", {})
        if task.kind == "tag":
            columns = {"token_labels": np.where(rng.random(length) < 0.6, rng.integers(0, 3, length), IGNORE_INDEX)}
        if task.kind == "answer":
            columns = {"start_labels": rng.integers(0, length, 1), "end_labels": rng.integers(0, length, 1)}
        samples.append(Sample(ids, np.full(length, IGNORE_INDEX, np.int32), columns))
    return samples


def make_loss(model: Any, task: ModelTask) -> DocumentLoss:
    if task.kind == "classify":
        problems: Any = {SINGLE: "single", MULTI: "multi", REGRESSION: "regression"}
        return ClassLoss(model, problems[task.problem])
    return TagLoss(model) if task.kind == "tag" else AnswerLoss(model)


def expected_loss(reference: Any, task: ModelTask, sample: Sample) -> Tensor:
    """The sum of the losses of a document, by the model itself."""
    columns = {name: torch.as_tensor(np.asarray(column)) for name, column in sample.columns.items()}
    ids = torch.from_numpy(sample.input_ids).long()[None]
    if task.kind == "answer":
        sides = {f"{side}_positions": columns[f"{side}_labels"] for side in ("start", "end")}
        return reference(ids, **sides).loss
    if task.kind == "tag":
        labels = columns["token_labels"][None]
        return reference(ids, labels=labels).loss * (labels != IGNORE_INDEX).sum()
    labels = columns["document_labels"]
    labels = labels.long() if task.problem == SINGLE else labels.float()
    return reference(ids, labels=labels).loss * labels.numel()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_losses_and_gradients_are_those_of_single_documents(kind: str, name: str, tmp_path: Path) -> None:
    task, samples = TASKS[name], make_samples(TASKS[name])
    reference = build(kind, task)
    reference.save_pretrained(tmp_path)
    model = models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), task=task)
    loss = make_loss(model, task)
    batch = round_up(collate(samples))
    total = loss(batch).losses["loss"]
    total.backward()
    expected = [expected_loss(reference, task, sample) for sample in samples]
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(
        loss.per_document(batch)[:, 0].float(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-6
    )
    scale = max(float(p.grad.norm()) for p in reference.parameters() if p.grad is not None)
    for key, parameter in reference.named_parameters():
        own = model.get_parameter(key).grad
        theirs = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        own = torch.zeros_like(parameter) if own is None else own
        assert (own - theirs).norm() <= 1e-5 * scale, key


@pytest.mark.parametrize(("kind", "name"), [("llama", "single")])
def test_a_document_changes_no_bit_of_another(kind: str, name: str, tmp_path: Path) -> None:
    task, samples = TASKS[name], make_samples(TASKS[name])
    build(kind, task).save_pretrained(tmp_path)
    loss = make_loss(models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), task=task), task)
    changed = [*samples]
    changed[1] = Sample(samples[1].input_ids[::-1].copy(), samples[1].labels, samples[1].columns)
    with torch.no_grad():
        before, after = (loss.per_document(collate(each)) for each in (samples, changed))
        nothing = start_without_labels(samples[1])
        assert loss(nothing).losses["loss"] == 0 and loss.per_document(nothing).shape == (0, 2)
    others = [0, 2, 3, 4]
    assert before[others].equal(after[others]) and before[1, 0] != after[1, 0]


def test_a_head_for_other_labels_is_new_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    build("llama", TASKS["single"]).save_pretrained(tmp_path)
    config, task = ModelConfig(id=str(tmp_path), dtype="float32"), ModelTask("classify", ("no", "yes"), SINGLE)
    warnings: list[Any] = []
    first, second, third = (
        models.load_model(config, task=task, seed=seed, sink=warnings.append).get_parameter("score.weight")
        for seed in (1, 1, 2)
    )
    assert len(first) == 2
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert 0.01 < first.std() < 0.03  # initializer_range of the architecture
    assert any("negative" in str(warning) for warning in warnings)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "name", "target_modules"),
    [*((*case, "all-linear") for case in ROUND_TRIPS), *((*case, "none") for case in HEADS_ALONE)],
)
def test_peft_reads_adapter_and_head(kind: str, name: str, target_modules: Any, tmp_path: Path) -> None:
    task, samples = TASKS[name], make_samples(TASKS[name])
    language_model(kind).save_pretrained(tmp_path / "base")
    config = ModelConfig(id=str(tmp_path / "base"), dtype="float32")
    model = models.load_model(config, task=task, seed=3)
    adapter = LoraAdapter(rank=2, target_modules=target_modules)
    selection = adapters.attach(model, adapter, seed=0)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    adapters.save_adapter(model, tmp_path / "adapter", adapter, config.id, identity=adapters.identify(model))
    batch = collate(samples)
    with torch.no_grad():
        ours = models.forward_task(model, batch)
        described = AutoConfig.from_pretrained(tmp_path / "adapter" / "head")
        auto = {
            "classify": peft.AutoPeftModelForSequenceClassification,
            "tag": peft.AutoPeftModelForTokenClassification,
            "answer": peft.AutoPeftModelForQuestionAnswering,
        }[task.kind]
        labels = {} if task.kind == "answer" else {"id2label": described.id2label, "label2id": described.label2id}
        theirs = auto.from_pretrained(str(tmp_path / "adapter"), **labels).eval()
        rows = [outputs(theirs(torch.from_numpy(sample.input_ids).long()[None])) for sample in samples]
        again = models.load_model(config, task=task, seed=4)
        assert adapters.load_adapter(again, tmp_path / "adapter").modules_to_save == selection.modules_to_save
        assert torch.equal(models.forward_task(again, batch), ours)
    expected = torch.cat(rows, 0 if task.kind == "classify" else 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert described.architectures == [type(model).__name__]
    if task.labels:
        assert tuple(described.id2label.values()) == LABELS


def language_model(kind: str) -> Any:
    config = small_config(kind)
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = _PAD, _EOS, 0
    torch.manual_seed(0)
    model = new_model(config, ModelTask(), dtype=torch.float32)
    enliven(model)
    return model


def outputs(output: Any) -> Tensor:
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)


def test_a_head_of_the_checkpoint_keeps_its_labels_if_they_include_those_of_the_data() -> None:
    stored = ModelTask("classify", LABELS, SINGLE)
    found = Classify(kind="classify", problem="single", labels=("positive", "negative"))
    given = Classify(kind="classify")
    kept = keep_stored_labels(given, found, stored)
    assert isinstance(kept, Classify) and kept.labels == LABELS
    other = found.model_copy(update={"labels": ("positive", "mixed")})
    assert keep_stored_labels(given, other, stored) == other
    assert keep_stored_labels(given, found, ModelTask("tag", LABELS)) == found
    assert keep_stored_labels(found, found, stored) == found, "the order of the config is kept"


@pytest.mark.parametrize("ends_with_eos", [False, True])
def test_no_text_ends_with_the_padding_of_a_decoder(ends_with_eos: bool) -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForSequenceClassification(config)
    models.choose_padding(model, tokenizer, {eos, 9} if ends_with_eos else {9})
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert (tokenizer.pad_token_id == eos) != ends_with_eos


def test_a_reward_model_needs_no_padding() -> None:
    """GPT-2's only special token ends every answer; the head is read by position, but other programs need to know."""
    tokenizer = make_tokenizer(special=(), eos="<|endoftext|>", pad=None)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2ForSequenceClassification(config)
    ends = {tokenizer.eos_token_id}
    with pytest.raises(ModelError, match="no token for padding"):
        models.choose_padding(model, tokenizer, ends)
    assert "one answer at a time" in str(models.choose_padding(model, tokenizer, ends, is_needed=False))
    assert model.config.pad_token_id is None
