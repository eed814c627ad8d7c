"""Verifies a loaded model: packed documents must give the results that transformers gives for each document alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ingle.data.batch import collate
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.errors import ModelError
from ingle.models.boundary import COMPARE_CONFIG, reading
from ingle.models.forward.encoder_decoder import Row, forward_pairs
from ingle.models.forward.hidden_states import Head, computed_in, device_of, forward_packed, through_head
from ingle.models.forward.layout import layout_of
from ingle.models.forward.probe import Probe, make_probe
from ingle.models.forward.task_heads import forward_alone, forward_task
from ingle.models.forward.to_head import run_to_head
from ingle.models.forward.virtual_tokens import num_added_keys, virtual_ids
from ingle.models.kinds import kind_of, task_of
from ingle.models.text_part import text_config
from ingle.wording import first_line

#: Largest relative difference of a token's logits between the two halves and the full model. Rounding to bfloat16
#: causes about one per cent in two layers and more in eighty; a wrong head or mask causes 100 %.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
#: The same for the hidden states of a probe, which has few layers and almost no embedding.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}

_NUM_IDS = 64
_FIX = "choose a model of another architecture"


@torch.no_grad()
def verify(model: PreTrainedModel) -> None:
    """Compares packed documents with single documents, and the two halves of the model with the full model.

    Two short documents are run through the full model. If the config names lengths at which the computation changes
    (windows, chunks, positions), documents shorter and longer than each are run through a copy of the model in which
    these lengths are a few tokens: see :mod:`ingle.models.forward.probe`.

    Raises:
        ModelError: The results differ, the full model gives NaN or infinity, or the architecture cannot be verified.
    """
    if kind_of(model.config) == "encoder_decoder" and task_of(model).kind == "lm":
        # The tiny copy that chose the layout had windows of a few tokens.
        with _evaluating(model):
            _compare_pairs(model)
        return
    with _evaluating(model):
        if task_of(model).kind == "lm":
            _compare_logits(model)
        else:
            with _padding(model):
                _compare_outputs(model)
        with reading(_origin(model), f"{type(model).__name__} cannot be verified with short and long texts.", fix=_FIX):
            probe = make_probe(model)
        if probe is not None:
            with _evaluating(probe.model):
                _compare_lengths(model, probe)


@torch.no_grad()
def verify_virtual_tokens(model: PreTrainedModel) -> None:
    """Compares packed documents with single documents, both with the virtual tokens of an adapter.

    Raises:
        ModelError: The results differ, or the architecture cannot compute them.
    """
    if kind_of(model.config) != "causal" or task_of(model).kind != "lm":
        return
    device, lengths = device_of(model), (7, 5)
    documents = _documents(lengths, min(_NUM_IDS, text_config(model.config).vocab_size))
    added = torch.tensor(virtual_ids(model), dtype=torch.long, device=device)
    alone = []
    with _evaluating(model), _packing(model):
        for document in documents:
            ids = torch.cat((added, document.to(device)))[None]
            arguments = {"input_ids": ids, "position_ids": _positions(model, ids.shape[1]), "use_cache": False}
            alone.append(run_to_head(model, arguments)[0, len(added) :])
        packed = _forward(model, documents, device)[0]
    why = "its embeddings or its attention are not computed in a way that virtual tokens can enter"
    _require_close(model, packed.float(), torch.cat(alone).float(), lengths, _TOLERANCE, why)


@torch.no_grad()
def keys_of(model: PreTrainedModel, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Returns the keys and values of each layer for a text, ``[Hkv, P, Dh]``, to begin those of an adapter with.

    Args:
        model: A causal language model with weights, without virtual tokens.
        ids: The text.
    """
    cache = DynamicCache()
    text = torch.tensor(ids, device=device_of(model))[None]
    with _evaluating(model):
        positions = _positions(model, len(ids))
        run_to_head(model, {"input_ids": text, "position_ids": positions, "past_key_values": cache, "use_cache": True})
    layers: Any = cache.layers
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def _positions(model: PreTrainedModel, length: int) -> Tensor:
    """Returns the positions of a text alone, ``[1, T]``."""
    return torch.arange(length, device=device_of(model))[None] + layout_of(model).first_position + num_added_keys(model)


def _compare_logits(model: PreTrainedModel) -> None:
    device = device_of(model)
    lengths = (7, 5)
    documents = _documents(lengths, text_config(model.config).vocab_size)
    with reading(_origin(model), f"{type(model).__name__} cannot compute with these settings.", fix=COMPARE_CONFIG):
        theirs = _their_logits(model, [document.to(device) for document in documents]).float()
    ours = through_head(model, Head.logits, _forward(model, documents, device))[0].float()
    if not torch.isfinite(theirs).all():
        raise _not_finite(model)
    why = "its head, its positions or its attention are not computed in a way that Ingle supports"
    _require_close(model, ours, theirs, lengths, _TOLERANCE, why)


def _compare_outputs(model: PreTrainedModel) -> None:
    """Compares the outputs of a task's head."""
    device = device_of(model)
    config = text_config(model.config)
    special = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
    documents = []
    for document in _documents((7, 5), config.vocab_size):
        document[torch.isin(document, torch.tensor([each for each in special if isinstance(each, int)]))] = 3
        if kind_of(model.config) == "encoder_decoder":
            document[-1] = config.eos_token_id  # where they read a text
        documents.append(document)
    samples = [Sample(document.numpy(), np.full(len(document), IGNORE_INDEX), {}) for document in documents]
    with reading(_origin(model), f"{type(model).__name__} cannot compute with these settings.", fix=COMPARE_CONFIG):
        alone = [forward_alone(model, document[None].to(device))[0] for document in documents]
    theirs = torch.stack(alone) if alone[0].dim() == 1 else torch.cat(alone)
    ours = forward_task(model, collate(samples).to(device))
    if not torch.isfinite(theirs).all():
        raise _not_finite(model)
    # A new head is small and random, so that its outputs are near zero: their error counts as it is.
    difference = ours.reshape(theirs.shape).float() - theirs.float()
    error = difference.norm(dim=-1) / theirs.float().norm(dim=-1).clamp_min(1)
    if not error.max() <= _TOLERANCE.get(computed_in(model), max(_TOLERANCE.values())):
        raise ModelError(
            f"{type(model).__name__} gives different outputs for packed documents than for each document alone.",
            where="model.id",
            why=f"they differ by {error.max():.2g}; its head does not read documents in a way that Ingle supports",
            fix=_FIX,
        )


def _compare_pairs(model: PreTrainedModel) -> None:
    device = device_of(model)
    num_ids = min(_NUM_IDS, int(getattr(text_config(model.config), "vocab_size", _NUM_IDS)))
    lengths = (4, 6)
    sources, targets = ([document.to(device) for document in _documents(each, num_ids)] for each in ((7, 5), lengths))
    with reading(_origin(model), f"{type(model).__name__} cannot compute with these settings.", fix=COMPARE_CONFIG):
        alone = [
            model(input_ids=source[None], decoder_input_ids=target[None], use_cache=False).logits[0]
            for source, target in zip(sources, targets, strict=True)
        ]
    theirs = torch.cat(alone).float()
    with _packing(model):
        hidden = forward_pairs(model, Row.of(sources), Row.of(targets))
    ours = through_head(model, Head.logits, hidden)[0].float()
    if not torch.isfinite(theirs).all():
        raise _not_finite(model)
    why = "its head, its positions or its attention are not computed in a way that Ingle supports"
    if ours.shape != theirs.shape:
        raise ModelError(
            f"{type(model).__name__} does not compute its logits from one hidden state per token.",
            where="model.id",
            fix=_FIX,
        )
    _require_close(model, ours, theirs, lengths, _TOLERANCE, why)


def _their_logits(model: PreTrainedModel, documents: list[Tensor]) -> Tensor:
    if kind_of(model.config) != "causal":  # padding changes the results of some encoders
        return torch.cat([model(input_ids=document[None]).logits[0] for document in documents])
    lengths = torch.tensor([len(document) for document in documents], device=documents[0].device)
    rows = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    logits: Tensor = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits[mask]
    return logits


def _compare_lengths(model: PreTrainedModel, probe: Probe) -> None:
    device = device_of(model)
    documents = _documents(probe.lengths, probe.num_ids)
    with reading(_origin(model), f"{type(model).__name__} cannot compute texts of these lengths.", fix=_FIX):
        alone = [
            run_to_head(probe.model, {"input_ids": document[None].to(device), "use_cache": False})[0]
            for document in documents
        ]
    packed = _forward(probe.model, documents, device)[0]
    why = f"documents of {', '.join(map(str, probe.lengths))} tokens, with {probe.described}"
    _require_close(model, packed.float(), torch.cat(alone).float(), probe.lengths, _PROBE_TOLERANCE, why)


def _documents(lengths: tuple[int, ...], num_ids: int) -> list[Tensor]:
    ids = (torch.arange(sum(lengths)) * 7919 + 11) % num_ids
    return list(ids.split(lengths))


def _forward(model: PreTrainedModel, documents: list[Tensor], device: torch.device) -> Tensor:
    """Returns the hidden states of the packed documents."""
    lengths = torch.tensor([0, *map(len, documents)])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    cu_seqlens = lengths.cumsum(0).to(torch.int32)
    with _packing(model):
        return forward_packed(
            model, torch.cat(documents)[None].to(device), positions[None].to(device), cu_seqlens.to(device)
        )


@contextmanager
def _packing(model: PreTrainedModel) -> Iterator[None]:
    """Raises a clear error if the architecture fails on packed documents."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and layout_of(model).kind == "packed":
            raise  # Ingle's own attention failed, or memory is exhausted
        raise ModelError(
            f"{type(model).__name__} does not support packed documents.",
            where="model.id",
            why=f"{type(error).__name__}: {first_line(error)}",
            fix=_FIX,
        ) from error


def _require_close(
    model: PreTrainedModel,
    ours: Tensor,
    theirs: Tensor,
    lengths: tuple[int, ...],
    tolerances: dict[torch.dtype, float],
    why: str,
) -> None:
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)
    # The median of a document: rounding may make a router send a single token to another expert.
    worst = max(document.median().item() for document in error.split(lengths))
    if not worst <= tolerances.get(computed_in(model), max(tolerances.values())):
        raise ModelError(
            f"{type(model).__name__} gives different results for packed documents than for each document alone.",
            where="model.id",
            why=f"they differ by {worst:.2%}; {why}",
            fix=_FIX,
        )


def _origin(model: PreTrainedModel) -> str:
    """Returns the config.json of a model, or the option that names the model."""
    folder = model.config.name_or_path
    path = Path(folder or "") / "config.json"
    return str(path) if folder and path.is_file() else "model.id"


def _not_finite(model: PreTrainedModel) -> ModelError:
    damaged = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not torch.isfinite(weight).all()
    ]
    if damaged:
        return ModelError(
            f"The weight {damaged[0]} contains NaN or infinity.",
            where="model.id",
            why=f"{len(damaged)} weights are affected",
            fix="download the checkpoint again, or choose another",
        )
    message = f"{type(model).__name__} computes NaN or infinity, although all its weights are finite."
    if computed_in(model) == torch.float32:
        why = "its settings cause this in float32 too"
        return ModelError(message, where=_origin(model), why=why, fix=COMPARE_CONFIG)
    why = f"the values overflow in {str(computed_in(model)).removeprefix('torch.')}"
    return ModelError(message, where="model.dtype", why=why, fix="--model.dtype=float32")


@contextmanager
def _padding(model: PreTrainedModel) -> Iterator[None]:
    """Gives a model without a padding token one inside the block; decoders are read at the token before it."""
    config = text_config(model.config)
    is_missing = getattr(config, "pad_token_id", None) is None
    if is_missing:
        config.pad_token_id = config.vocab_size - 1
    try:
        yield
    finally:
        if is_missing:
            config.pad_token_id = None


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
