"""Chooses the layout of an architecture before any weight is read, by trying a tiny random copy of it.

Of the layouts in :data:`_CANDIDATES`, the first wins that computes each document of a ragged batch as transformers
does alone. :func:`ingle.models.verify` repeats the comparison with the real weights.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ingle.models.boundary import explain
from ingle.models.forward.encoder_decoder import Row, forward_pairs, pair_to_head
from ingle.models.forward.hidden_states import forward_packed
from ingle.models.forward.layout import Layout, apply_layout, pattern_of
from ingle.models.forward.mixers import base_of, original_class, source
from ingle.models.forward.rotary_by_length import rotate_by_document
from ingle.models.forward.row_masks import MaskForm
from ingle.models.forward.to_head import name_projection
from ingle.models.kinds import ModelKind, ModelTask, kind_of, new_model
from ingle.models.loading.cache_choice import choose_caching
from ingle.models.loading.continuation_choice import choose_continuation
from ingle.models.loading.small_config import Size, shrink
from ingle.models.text_part import build_text_part, is_wrapper, text_config, with_text_config

_SIZE = Size(width=32, layers=4, vocab_size=128, positions=40)
#: A copy with more parameters has a size that was not shrunk.
_MOST_PARAMETERS = 6_000_000
#: On both sides of the windows and chunks of the copy; together longer than its longest text.
_LENGTHS = (21, 5, 13, 2, 9)
#: Lengths of the targets, which an encoder-decoder predicts from documents of the other lengths.
_TARGET_LENGTHS = (9, 13, 2, 21, 5)
_SHORT = 2
#: Largest relative difference of a token's hidden states, in float32.
_TOLERANCE = 1e-4

_FORMS: tuple[MaskForm, ...] = ("additive", "visible", "hidden")
_LAST = (Layout("rows"), Layout("equal_rows"))
_CANDIDATES: dict[ModelKind, tuple[Layout, ...]] = {
    "causal": (
        Layout(),
        Layout(takes_bounds=False),
        *(Layout(deals_attention=True, mask_form=form, takes_bounds=each) for form in _FORMS for each in (True, False)),
        Layout(deals_attention=True, equal=True),
        *_LAST,
    ),
    "encoder": (
        Layout(described=True),
        Layout(),
        *(
            Layout(deals_attention=True, mask_form=form, takes_bounds=takes_bounds, equal=equal)
            for equal in (False, True)
            for form in (*_FORMS, "padding")
            for takes_bounds in (True, False)
        ),
        Layout(deals_attention=True, mask_form="none", takes_bounds=False, equal=True),
        *_LAST,
    ),
    "encoder_decoder": (Layout(described=True), Layout(), *_LAST),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a tiny copy of an architecture shows.

    Attributes:
        layout: None if no layout is exact.
        is_causal: Whether no token sees a later one.
        reason: Why there is no layout.
    """

    layout: Layout | None
    is_causal: bool = True
    reason: str = "it gives other results for several documents in a batch than for each alone"


@dataclass(frozen=True, slots=True)
class _Described:
    """A config that is compared by its content."""

    content: str
    config: PretrainedConfig = field(compare=False)
    trust_remote_code: bool = False


def choose_layout(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Choice:
    """Returns the fastest exact layout of an architecture with the options of this config."""
    try:
        small = _without_labels(with_text_config(config, shrink(text_config(config), _SIZE)))
    except Exception as error:  # settings that the architecture's own code rejects in other sizes
        return _untried(Layout(), error)
    return _choose(_Described(f"{type(small).__name__} {small.to_dict()}", small, trust_remote_code))


def _without_labels(config: PretrainedConfig) -> PretrainedConfig:
    """Returns a config without the labels of a task head, which the layout does not depend on."""
    config = copy.copy(config)
    config.num_labels, config.problem_type, config.architectures = 2, None, None
    return config


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def _choose(described: _Described) -> Choice:
    kind = kind_of(described.config)
    try:
        reference = _build(described.config, trust_remote_code=described.trust_remote_code)
        if kind == "encoder_decoder":
            return _choose_for_pairs(reference, _documents(reference))
        documents, alone = _compute_documents(reference)
        is_causal = kind == "causal" and _is_causal(reference, documents[0])
        before_head = _has_layers_before_head(reference, documents[0], alone[0])
        added_bias = "" if kind == "causal" else _added_bias(reference, documents[0])
        if kind == "encoder" and not _calls_output_layer(reference, documents[0]):
            return Choice(None, is_causal, reason="it computes its logits without calling its output layer")
    except Exception as error:
        layout = _CANDIDATES[kind][0] if kind == "encoder_decoder" else Layout()
        return _untried(replace(layout, has_layers_before_head=kind != "causal"), error)
    found = _fastest(reference, before_head, added_bias, documents, torch.cat(alone))
    if found is not None and kind == "causal":
        found = choose_caching(reference, found, documents[0])
        found = choose_continuation(reference, found)
    return Choice(found, is_causal)


def _untried(layout: Layout, error: Exception) -> Choice:
    return Choice(replace(layout, tried=False, slower_because=explain(error)))


def _fastest(
    reference: PreTrainedModel,
    before_head: bool,
    added_bias: str,
    documents: list[Tensor],
    expected: Tensor,
    targets: list[Tensor] | None = None,
) -> Layout | None:
    """Returns the first layout that is exact, with the reason against the very first; None if there is none."""
    because = ""
    for candidate in _CANDIDATES[kind_of(reference.config)]:
        layout = replace(candidate, has_layers_before_head=before_head, added_bias=added_bias, slower_because=because)
        # Of pairs, the input of the output layer is expected; of others, the hidden states of the base model.
        trial = layout if targets is not None else replace(layout, has_layers_before_head=False)
        failure = _failure(reference, trial, documents, expected, targets)
        if failure is None:
            return replace(layout, read=_read_linears(reference, layout, documents, targets))
        because = because or failure
    return None


def _choose_for_pairs(reference: PreTrainedModel, sources: list[Tensor]) -> Choice:
    targets = list(torch.cat(sources).flip(0).split(_TARGET_LENGTHS))
    stored: Any = reference
    for before_head in (True, False):  # a head that is no module of its own gets the hidden states of the base model
        stored.packed_layout = Layout(has_layers_before_head=before_head)
        pairs = zip(sources, targets, strict=True)
        try:
            expected = torch.cat([pair_to_head(copy.deepcopy(reference), *pair) for pair in pairs])
        except LookupError:
            continue
        break
    added_bias = "final_logits_bias" if hasattr(reference, "final_logits_bias") else ""
    return Choice(_fastest(reference, before_head, added_bias, sources, expected, targets))


def _build(config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    if is_wrapper(config):
        return _build_text_part(config)

    def make() -> PreTrainedModel:
        copied = copy.deepcopy(config)
        return new_model(copied, ModelTask(), dtype=torch.float32, trust_remote_code=trust_remote_code)

    with torch.device("meta"):
        on_meta = make()
    size = sum(parameter.numel() for parameter in on_meta.parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        enliven(model)
    name_projection(model)
    model.eval().requires_grad_(False)
    return model


def _build_text_part(config: PretrainedConfig) -> PreTrainedModel:
    model = build_text_part(config, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.to_empty(device="cpu")
        model.initialize_weights()
        model.tie_weights()
        enliven(model)
    model.eval().requires_grad_(False)
    return model


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Draws random weights so large that every path of a small model matters, attention included."""
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if re.search(r"A_log|dt_bias|^dt|time_decay|recurrent_param|slope|lambda", leaf):
            continue
        if parameter.dim() < 2:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding) or "embed" in name.lower():
            std = 0.5
        elif isinstance(owner, nn.Conv1d) or parameter.dim() > 3:
            std = parameter[0].numel() ** -0.5
        else:
            std = parameter.shape[0 if type(owner).__name__ == "Conv1D" else -1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape) * std)


def _compute_documents(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Returns documents and their hidden states; some architectures cannot compute very short ones."""
    try:
        documents = _documents(model)
        return documents, [_compute_alone(model, document) for document in documents]
    except RuntimeError:
        documents = [document for document in _documents(model) if len(document) > _SHORT]
        return documents, [_compute_alone(model, document) for document in documents]


def _documents(model: PreTrainedModel) -> list[Tensor]:
    vocab_size = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(min(3, vocab_size - 1), min(80, vocab_size), (sum(_LENGTHS),), generator=generator)
    return list(ids.split(_LENGTHS))


def _compute_alone(model: PreTrainedModel, document: Tensor) -> Tensor:
    """Returns the hidden states of a document; a copy computes them, because dynamic positions keep state."""
    hidden: Tensor = base_of(copy.deepcopy(model))(input_ids=document[None], use_cache=False).last_hidden_state
    return hidden[0]


def _is_causal(model: PreTrainedModel, document: Tensor) -> bool:
    """Returns whether the logits of the first half of a document stay if its second half changes."""
    half = len(document) // 2
    changed = torch.cat((document[:half], document[half:].roll(1)))
    before, after = (
        copy.deepcopy(model)(input_ids=ids[None], use_cache=False).logits[0, :half] for ids in (document, changed)
    )
    return _difference(after, before) <= _TOLERANCE


def _has_layers_before_head(model: PreTrainedModel, document: Tensor, hidden: Tensor) -> bool:
    """Returns whether the output layer gets anything else than the hidden states of the base model."""
    model, kept = copy.deepcopy(model), list[Tensor]()
    output_layer = model.get_output_embeddings()
    if not isinstance(output_layer, nn.Module):
        return False
    output_layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    model(input_ids=document[None], use_cache=False)
    if not kept or kept[0].shape != hidden.shape:
        return bool(kept)
    scale = (kept[0] * hidden).sum() / hidden.square().sum()  # a factor on the logits, which the head applies
    return _difference(kept[0], hidden * scale) > _TOLERANCE


def _calls_output_layer(model: PreTrainedModel, document: Tensor) -> bool:
    model, calls = copy.deepcopy(model), list[bool]()
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(True))
    model(input_ids=document[None])
    return bool(calls)


def _added_bias(model: PreTrainedModel, document: Tensor) -> str:
    """Returns the name of a bias that is added to what the output layer returns; empty if there is none."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return ""
    before = model(input_ids=document[None]).logits
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value is layer.bias or value.numel() != layer.out_features or value.shape[-1] != layer.out_features:
            continue
        changed = copy.deepcopy(model)
        changed.get_parameter_or_buffer(name).add_(1.0)
        if torch.allclose(changed(input_ids=document[None]).logits, before + 1.0, atol=_TOLERANCE):
            return name
    return ""


def _failure(
    model: PreTrainedModel,
    layout: Layout,
    documents: list[Tensor],
    expected: Tensor,
    targets: list[Tensor] | None = None,
) -> str | None:
    """Returns why a layout does not compute what is expected; None if it does."""
    try:
        actual = _compute_packed(copy.deepcopy(model), layout, documents, targets)
    except Exception as error:  # architectures fail in many ways if they get what they do not expect
        return explain(error)
    exact = actual.shape == expected.shape and _difference(actual, expected) <= _TOLERANCE
    return None if exact else "packed documents get other results than single ones"


def _compute_packed(
    model: PreTrainedModel, layout: Layout, documents: list[Tensor], targets: list[Tensor] | None = None
) -> Tensor:
    """Returns the hidden states of the packed documents, or of their targets; changes the model."""
    if targets is not None:
        apply_layout(model, layout)
        rotate_by_document(model)
        return forward_pairs(model, Row.of(documents), Row.of(targets))[0]
    lengths = [len(document) for document in documents]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    apply_layout(model, layout)
    rotate_by_document(model)
    return forward_packed(model, torch.cat(documents)[None], position_ids, cu_seqlens)[0]


class _WithoutWeight(nn.Module):
    """A linear layer that can be called only, as a quantized one."""

    weight = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._called = linear

    def forward(self, input: Tensor) -> Tensor:
        """Returns what the linear layer does."""
        output: Tensor = self._called(input)
        return output


def _read_linears(
    model: PreTrainedModel, layout: Layout, documents: list[Tensor], targets: list[Tensor] | None = None
) -> frozenset[str]:
    """Returns the linear layers without whose weights the model cannot be computed, although they can be called."""
    head, candidates = model.get_output_embeddings(), dict[str, list[str]]()
    for name, owner in model.named_modules():
        for key, child in owner.named_children():
            if child is head or not isinstance(child, nn.Linear):
                continue
            if f"self.{key}.weight" in source(original_class(owner)):
                path = f"{name}.{key}".removeprefix(".")
                candidates.setdefault(pattern_of(path), []).append(path)
    found = set[str]()
    for pattern, names in candidates.items():
        changed = copy.deepcopy(model)
        for name in names:
            linear = changed.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            changed.set_submodule(name, _WithoutWeight(linear))
        try:
            _compute_packed(changed.train(), layout, documents, targets)
        except (AttributeError, TypeError):
            found.add(pattern)
    return frozenset(found)


def _difference(actual: Tensor, expected: Tensor) -> float:
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(error.max())
