"""Every architecture is loaded, verified, quantized, adapted, trained, saved and generates answers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ingle import adapters, models, quant
from ingle.config import BaseConfig, Int8Base, LoraAdapter, Nf4Base, NoBase
from ingle.data.batch import Batch, collate, round_up
from ingle.data.types import Sample
from ingle.events import Event, Warned
from ingle.kernels.layers.cross_entropy import linear_cross_entropy
from ingle.models.loading.safetensors_files import read_index
from ingle.objectives import NextTokenLoss

NF4, INT8 = Nf4Base(format="nf4"), Int8Base(format="int8")
#: How a module is quantized does not depend on the format, and formats have their own contract tests.
QUANTIZED_BASES = [
    NF4,
    pytest.param(Nf4Base(format="nf4", double_quant=False), marks=pytest.mark.sweep),
    pytest.param(INT8, marks=pytest.mark.sweep),
]


def pack(documents: list[list[int]]) -> Batch:
    return collate([Sample(np.array(ids, np.int32), np.array([-100, *ids[1:]], np.int32)) for ids in documents])


def load(checkpoint, base: BaseConfig | None = None) -> PreTrainedModel:
    events: list[Event] = []
    model = models.load_model(checkpoint.config, base, sink=events.append)
    assert not [event for event in events if isinstance(event, Warned)]
    return model


def packed_logits(model: PreTrainedModel, documents: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return models.head(model).logits(models.forward_hidden(model, pack(documents)))[0]


def separate_logits(model: PreTrainedModel, documents: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([document])).logits[0] for document in documents])


def test_loaded_weights_and_buffers_are_those_of_transformers(checkpoint) -> None:
    ours, reference = load(checkpoint), checkpoint.reference()
    expected = {**reference.state_dict(), **dict(reference.named_buffers())}
    actual = {**ours.state_dict(), **dict(ours.named_buffers())}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (reference.get_input_embeddings().weight is reference.get_output_embeddings().weight)
    assert ours.generation_config.to_dict() == reference.generation_config.to_dict()


def test_packed_documents_give_the_logits_of_transformers_one_by_one(checkpoint, documents) -> None:
    ours = packed_logits(load(checkpoint), documents)
    torch.testing.assert_close(ours, separate_logits(checkpoint.reference(), documents), rtol=1e-4, atol=1e-4)


def test_validation_losses_of_documents_are_those_of_transformers(checkpoint, documents) -> None:
    ours, reference = NextTokenLoss(load(checkpoint)), checkpoint.reference()
    batch = round_up(pack(documents))
    assert len(batch.cu_seqlens) - 1 == len(documents) + 1, "a document is added to round up the length"
    with torch.no_grad():
        found = ours.per_document(batch)
        total = ours(batch).losses["loss"]
        sums = []
        for document in documents:
            logits, ids = reference(input_ids=torch.tensor([document])).logits[0].double(), torch.tensor(document)
            sums.append(nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[:, 0], torch.stack(sums), rtol=1e-4, atol=1e-4)
    assert found[:, 1].tolist() == [len(document) - 1 for document in documents]
    torch.testing.assert_close(found[:, 0].sum().float(), total, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_as_transformers_own(checkpoint, documents) -> None:
    """Relative to float32 arithmetic on weights rounded to bfloat16."""
    ours = models.load_model(checkpoint.config.model_copy(update={"dtype": "bfloat16"}))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    exact = separate_logits(copy.deepcopy(reference).float(), documents)

    def error(logits: Tensor) -> float:
        return ((logits.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()

    assert error(packed_logits(ours, documents)) < 1.5 * error(separate_logits(reference, documents)) + 1e-3


@pytest.mark.parametrize("base", QUANTIZED_BASES, ids=lambda base: f"{base.format}-{getattr(base, 'double_quant', '')}")
def test_a_quantized_base_gives_the_logits_of_its_decoded_weights(checkpoint, documents, base) -> None:
    ours, reference = load(checkpoint, base), checkpoint.reference()
    replaced = replace_by_decoded(reference, ours)
    head = reference.get_output_embeddings()
    linears = {
        name
        for name, module in reference.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    experts = {name for name, parameter in reference.named_parameters() if parameter.dim() == 3}
    assert replaced == linears | experts, "a linear layer was not quantized"
    assert all(is_expected_plain(entry.name, ours) for entry in quant.audit(ours).unquantized)
    torch.testing.assert_close(
        packed_logits(ours, documents), separate_logits(reference, documents), rtol=1e-3, atol=1e-3
    )


def replace_by_decoded(reference: PreTrainedModel, ours: PreTrainedModel) -> set[str]:
    """Copies the decoded weight of each quantized module into the reference, after comparing it."""
    replaced = set()
    for name, module in ours.named_modules():
        if isinstance(module, quant.QuantStack):
            target = reference.get_parameter(name)
            decoded = torch.stack([module.decode(expert, torch.float32) for expert in range(module.num_stacked)])
        elif isinstance(module, quant.QuantLinear):
            target = reference.get_parameter(f"{name}.weight")
            decoded = module.decode(torch.float32)
            decoded = decoded.T if module.transposed else decoded
        else:
            continue
        decoded = decoded if decoded.shape == target.shape else decoded.mT
        error = (decoded - target).norm() / target.norm()
        assert 0 < error < 0.12, (name, error)
        target.data.copy_(decoded)
        replaced.add(name)
    return replaced


def is_expected_plain(name: str, model: PreTrainedModel) -> bool:
    module = model.get_submodule(name)
    kept = (model.get_input_embeddings(), model.get_output_embeddings())
    return module in kept or isinstance(module, nn.Embedding) or "Router" in type(module).__name__


@pytest.mark.parametrize("base", [NoBase(), NF4, pytest.param(INT8, marks=pytest.mark.sweep)], ids=lambda b: b.format)
def test_one_step_trains_the_adapter_alone(checkpoint, documents, base) -> None:
    model = load(checkpoint, base)
    adapters.attach(model, LoraAdapter(rank=4), seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = dict(adapters.trainable_parameters(model))
    batch = pack(documents)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.05)
    model.train()
    losses = []
    for _ in range(3):
        loss = supervised_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and changed <= trainable.keys()
    unchanged_b = [name for name in trainable if name.endswith("lora_b") and name not in changed]
    assert not unchanged_b, "an adapter got no gradient"


def supervised_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    hidden = models.forward_hidden(model, batch)[0]
    targets = torch.cat([batch.labels[0, 1:], torch.tensor([-100])])
    head = models.head(model)
    total = linear_cross_entropy(
        hidden, head.weight, targets, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    )
    return total / batch.num_supervised


def test_greedy_answers_are_those_of_transformers(checkpoint, documents, tokenizer) -> None:
    ours, reference = load(checkpoint), checkpoint.reference()
    answers = models.generate(ours, tokenizer, documents, max_new_tokens=8, batch_size=3)
    for document, answer in zip(documents, answers, strict=True):
        prompt = torch.tensor([document])
        ids = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=2
        )[0, len(document) :].tolist()
        ended = 2 in ids
        assert list(answer.token_ids) == (ids[: ids.index(2)] if ended else ids)
        assert answer.finish_reason == ("stop" if ended else "length")


def test_saved_model_is_read_back_by_transformers(checkpoint, documents, tokenizer, tmp_path: Path) -> None:
    model = load(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    folder = tmp_path / "model"
    models.save_pretrained(model, tokenizer, folder)
    assert read_index(folder).keys() == read_index(checkpoint.folder).keys(), (
        "the names differ from those of the checkpoint"
    )
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(
        separate_logits(again, documents), separate_logits(model, documents), rtol=1e-5, atol=1e-5
    )
    config, original = (json.loads((each / "config.json").read_text()) for each in (folder, checkpoint.folder))
    assert {key: value for key, value in config.items() if "drop" in key} == {
        key: value for key, value in original.items() if "drop" in key
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("base", [NoBase(), pytest.param(NF4, marks=pytest.mark.sweep)], ids=lambda base: base.format)
def test_recomputed_layers_give_the_same_gradient(checkpoint, documents, base) -> None:
    gradients = []
    for recompute in (False, True):
        model = load(checkpoint, base)
        if recompute:
            models.recompute_layers(model)
        model.train()
        calls: list[int] = []
        norm = next(m for m in models.decoder_layers(model)[0].children() if "Norm" in type(m).__name__)
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        supervised_loss(model, pack(documents)).backward()
        assert len(calls) == (2 if recompute else 1)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


#: The layers that compute queries and values, where they have other names.
QUERIES_AND_VALUES = {
    "phi3": ("qkv_proj",),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "falcon": ("query_key_value",),
    "deepseek_v3": ("q_b_proj", "kv_b_proj"),
}


@pytest.mark.parametrize("base", [NoBase(), NF4], ids=lambda base: base.format)
def test_adapters_on_few_layers_get_the_same_gradient_packed_recomputed_and_fused(checkpoint, documents, base) -> None:
    names = QUERIES_AND_VALUES.get(checkpoint.name, ("q_proj", "v_proj"))

    def adapted() -> PreTrainedModel:
        model = load(checkpoint, base)
        adapters.attach(model, LoraAdapter(rank=2, target_modules=names), seed=0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in adapters.trainable_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.train()

    def gradients(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            if batch.num_supervised:
                (supervised_loss(model, batch) * batch.num_supervised).backward()
        found = {name: parameter.grad for name, parameter in adapters.trainable_parameters(model)}
        assert found and all(gradient is not None and gradient.any() for gradient in found.values())
        return found

    def fuse(model: PreTrainedModel) -> None:
        report = adapters.fuse(model)
        assert report.fused + sum(report.reasons.values()) == 2, "a layer is neither fused nor accounted for"

    first, second = adapted(), adapted()
    expected = gradients(first, [pack([document]) for document in documents])
    for model, change in (
        (first, lambda _: None),
        (first, models.recompute_layers),
        (first, fuse),
        (second, fuse),  # without recomputation
        (second, models.recompute_layers),  # as after a lack of memory
    ):
        change(model)
        for name, gradient in gradients(model, [pack(documents)]).items():
            # Single elements near zero err more, and on each processor others.
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-4, (name, error)
