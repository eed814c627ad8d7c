"""Packed documents get the losses and adapter gradients of single ones in transformers, whatever mixes their tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ingle import adapters, models
from ingle.config import BaseConfig, LoraAdapter, ModelConfig, Nf4Base, NoBase
from ingle.errors import ModelError, QuantizationError
from ingle.models.loading.layout_choice import enliven
from tests.contract.models.test_architectures import pack, replace_by_decoded
from tests.contract.models.tiny_types import CAUSAL_TYPES, small_config

#: About a tenth of all: one of every way to mix tokens, by itself and with others.
SOME = (
    "bloom",
    "bigbird_pegasus",
    "deepseek_v32",
    "falcon_h1",
    "gpt_oss",
    "gptj",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "llama4_text",
    "mamba",
    "mamba2",
    "mpt",
    "nemotron",
    "qwen3_5_text",
    "recurrent_gemma",
    "roberta",
    "rwkv",
    "whisper",
)
#: Why a type cannot be tried here, or is refused.
REASONS = {
    "cpmant": "its tokens see later tokens",
    "prophetnet": "its tokens see later tokens",
    "xlm": "it is an encoder",
    "xlnet": "its tokens see later tokens",
}
#: Types whose stacked weights have a layout that cannot be quantized.
STACKED = ("dbrx", "inkling_text", "jetmoe", "longcat_flash", "recurrent_gemma", "zamba")
#: Why there is no small model of a type.
NOT_BUILT = {
    **dict.fromkeys(("dots3_note", "dots3_note_text", "qwen4_exp"), "the sizes of the default config do not shrink"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "AutoModelForCausalLM cannot build it; it reads music codes"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it drafts tokens for another model"),
    "gemma3n": "its image tower needs Pillow",
    "reformer": "it needs texts whose length is a multiple of its chunks",
}
LENGTHS = (7, 30, 3, 18, 11)
BASES = [NoBase(), Nf4Base(format="nf4")]
TYPES = [*SOME, *(pytest.param(kind, marks=pytest.mark.sweep) for kind in CAUSAL_TYPES if kind not in SOME)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind in NOT_BUILT:
            pytest.skip(NOT_BUILT[kind])
        if kind not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32)
            enliven(model)
            made[kind] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[kind])
        return made[kind]

    return write


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    ids = torch.randint(3, 80, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))
    return [part.tolist() for part in ids.split(LENGTHS)]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.format)
@pytest.mark.parametrize("kind", TYPES)
def test_losses_and_gradients_are_those_of_single_documents(kind, base, folder_of, documents) -> None:
    folder = folder_of(kind)
    if kind in REASONS:
        with pytest.raises(ModelError, match=REASONS[kind]):
            load(folder, base)
        return
    if kind in STACKED and base.format != "none":
        with pytest.raises(QuantizationError, match="in a layout that cannot be quantized yet"):
            load(folder, base)
        return
    model = load(folder, base)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    replace_by_decoded(reference, model)
    attach(model)
    losses = packed_losses(model, documents)
    losses.sum().backward()
    expected, gradients = reference_losses(reference, model, documents)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    floor = 3e-3 * max(gradient.norm() for gradient in gradients.values())
    for name, parameter in adapters.trainable_parameters(model):
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (actual - gradients[name]).norm() / gradients[name].norm().clamp_min(floor)
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("kind", TYPES)
def test_a_document_changes_no_bit_of_another(kind, folder_of, documents) -> None:
    if kind in REASONS:
        pytest.skip(REASONS[kind])
    model = load(folder_of(kind), NoBase())
    with torch.no_grad():
        before = packed_losses(model, documents)
        for changed in (0, 2, 4):
            other = [*documents]
            other[changed] = [(7 * token + 5) % 70 + 3 for token in other[changed]]
            after = packed_losses(model, other)
            kept = [place for place in range(len(documents)) if place != changed]
            assert torch.equal(after[kept], before[kept])
            assert after[changed] != before[changed]


def load(folder: Path, base: BaseConfig) -> PreTrainedModel:
    return models.load_model(ModelConfig(id=str(folder), dtype="float32"), base)


def attach(model: PreTrainedModel) -> None:
    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.train()


def packed_losses(model: PreTrainedModel, documents: list[list[int]]) -> Tensor:
    """Sums of the losses of each document, ``[D]``."""
    logits = models.head(model).logits(models.forward_hidden(model, pack(documents)))[0]
    return losses_of(list(logits.split([len(each) for each in documents])), documents)


def losses_of(logits: list[Tensor], documents: list[list[int]]) -> Tensor:
    pairs = zip(logits, documents, strict=True)
    return torch.stack([cross_entropy(row[:-1], torch.tensor(ids[1:]), reduction="sum") for row, ids in pairs])


def reference_losses(
    reference: PreTrainedModel, model: PreTrainedModel, documents: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses in transformers with adapters added to its weights, and the adapters' gradients."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in adapters.trainable_parameters(model)}
    changed = {}
    for name, a in leaves.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "lora_a":
            continue
        delta = leaves[f"{path}.lora_b"] @ a * model.get_submodule(path).scale
        owner = reference.get_submodule(path)
        changed[f"{path}.weight"] = owner.weight.detach() + (delta.T if isinstance(owner, Conv1D) else delta)
    reference.requires_grad_(False)
    logits = [
        functional_call(
            reference, changed, (), {"input_ids": torch.tensor([ids]), "use_cache": False}, tie_weights=False
        ).logits[0]
        for ids in documents
    ]
    losses = losses_of(logits, documents)
    values = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), values, strict=True)
    return losses.detach(), {name: torch.zeros_like(leaf) if v is None else v for (name, leaf), v in pairs}
