"""Compares packed documents in a small model of any type with single ones in transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ingle import adapters, models
from ingle.config import BaseConfig, LoraAdapter, ModelConfig, Nf4Base, NoBase
from ingle.models.forward.layout import layout_of
from ingle.models.loading.layout_choice import enliven
from ingle.planning.model_types import model_table
from tests.contract.models.test_architectures import pack, replace_by_decoded

FolderOf = Callable[[str], Path]
#: What each position of a document predicts; -100 for nothing.
Targets = Callable[[list[int]], list[int]]
#: What the decoder of an encoder-decoder reads; it predicts as many targets.
Reads = Callable[[list[int]], list[int]] | None


def writer(
    temporary: pytest.TempPathFactory,
    auto: Any,
    small_config: Callable[[str], PretrainedConfig],
    not_built: Mapping[str, str],
) -> FolderOf:
    """Returns what writes a random model of a type, once, and returns its folder; skips types that cannot be built."""
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind in not_built:
            pytest.skip(not_built[kind])
        if kind not in made:
            torch.manual_seed(0)
            model = auto.from_config(small_config(kind), dtype=torch.float32)
            enliven(model)
            made[kind] = temporary.mktemp("model")
            model.save_pretrained(made[kind])
        return made[kind]

    return write


def cases(types: Iterable[str], some: Collection[str], quantized: Collection[str]) -> list[Any]:
    """Every type with a plain and a quantized base; those outside of ``some`` and ``quantized`` are a sweep."""
    marked = []
    for base, chosen in ((NoBase(), some), (Nf4Base(format="nf4"), quantized)):
        for kind in types:
            marks = () if kind in chosen else pytest.mark.sweep
            marked.append(pytest.param(kind, base, marks=marks, id=f"{kind}-{base.format}"))
    return marked


def require_listed_layout(model: PreTrainedModel) -> None:
    """A model has the layout of its type in the table of the release; all layouts are exact, but not equally fast."""
    table, layout = model_table(), layout_of(model)
    if table.transformers != transformers.__version__:
        return
    for entry in table.find(model.config.model_type, models.kind_of(model.config)):
        if entry.layout is not None:
            assert (layout.kind, layout.dealt) == (entry.layout, entry.dealt)


def random_documents(lengths: tuple[int, ...]) -> list[list[int]]:
    ids = torch.randint(3, 80, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    return [part.tolist() for part in ids.split(lengths)]


def load(folder: Path, base: BaseConfig) -> PreTrainedModel:
    return models.load_model(ModelConfig(id=str(folder), dtype="float32"), base)


def require_same_losses_and_gradients(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    documents: list[list[int]],
    targets: Targets,
    decoder: Reads = None,
    rounding: float = 1e-4,
) -> None:
    replace_by_decoded(reference, model)
    attach(model)
    losses = packed_losses(model, documents, targets, decoder)
    losses.sum().backward()
    expected, gradients = reference_losses(reference, model, documents, targets, decoder)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    floor = 3e-3 * max(gradient.norm() for gradient in gradients.values())
    for name, parameter in adapters.trainable_parameters(model):
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (actual - gradients[name]).norm() / gradients[name].norm().clamp_min(floor)
        assert error < rounding, (name, float(error))


def require_independent_documents(
    model: PreTrainedModel, documents: list[list[int]], targets: Targets, decoder: Reads = None
) -> None:
    """A change in one document changes no bit of another's loss."""
    with torch.no_grad():
        before = packed_losses(model, documents, targets, decoder)
        for changed in (0, 2, 4):
            other = [*documents]
            other[changed] = [(7 * token + 5) % 70 + 3 for token in other[changed]]
            after = packed_losses(model, other, targets, decoder)
            kept = [place for place in range(len(documents)) if place != changed]
            assert torch.equal(after[kept], before[kept])
            assert after[changed] != before[changed]


def attach(model: PreTrainedModel) -> None:
    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.train()


def packed_losses(
    model: PreTrainedModel, documents: list[list[int]], targets: Targets, decoder: Reads = None
) -> Tensor:
    """Sums of the losses of each document, ``[D]``."""
    batch = pack(documents)
    if decoder is not None:
        columns = pack([decoder(ids) for ids in documents]).columns
        batch = replace(batch, columns={**batch.columns, **{f"decoder_{name}": each for name, each in columns.items()}})
    logits = models.head(model).logits(models.forward_hidden(model, batch))[0]
    return losses_of(list(logits.split([len(targets(ids)) for ids in documents])), documents, targets)


def losses_of(logits: list[Tensor], documents: list[list[int]], targets: Targets) -> Tensor:
    pairs = zip(logits, documents, strict=True)
    return torch.stack([cross_entropy(row, torch.tensor(targets(ids)), reduction="sum") for row, ids in pairs])


def reference_losses(
    reference: PreTrainedModel, model: PreTrainedModel, documents: list[list[int]], targets: Targets,
    decoder: Reads = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
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
    options = {"use_cache": False} if "use_cache" in inspect.signature(reference.forward).parameters else {}
    logits = []
    for ids in documents:
        inputs = {"input_ids": torch.tensor([ids]), **options}
        if decoder is not None:
            inputs["decoder_input_ids"] = torch.tensor([decoder(ids)])
        logits.append(functional_call(reference, changed, (), inputs, tie_weights=False).logits[0])
    losses = losses_of(logits, documents, targets)
    values = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), values, strict=True)
    return losses.detach(), {name: torch.zeros_like(leaf) if v is None else v for (name, leaf), v in pairs}
