"""The two halves of a language model: the decoder up to its last norm, and the output head.

The loss never materialises logits, so it needs the head's weight and not the head's module.  Architectures do
different things to their logits (scale, divide, cap); what is known is read from the config, and :func:`verify`
compares the halves with the whole once per load, so that nothing unknown goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.models.attention import IMPLEMENTATION
from ingle.quant import QuantEmbedding, QuantLinear
from ingle.wording import first_line

if TYPE_CHECKING:
    from ingle.data.types import Batch

#: Largest relative difference of a token's logits between the halves and the whole.
#: Rounding to bfloat16 alone makes about one per cent in two layers and more in eighty; what is looked for makes all.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: ``cap(logit_scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        logit_scale: Factor on the logits.
        softcap: ``softcap * tanh(logits / softcap)`` when set.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Applies the head to ``[..., H]``, giving ``[..., V]``."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head(model: PreTrainedModel) -> Head:
    """The output head of a model; a packed one is decoded anew by every call, and kept as long as the result is.

    Raises:
        ModelError: When the head is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear | QuantLinear):
        raise ModelError(
            f"the output head is a {type(layer).__name__}, not a linear layer.",
            where="model.id",
            fix="take lm_head out of adapter.target_modules; adapter.trainable_modules trains it whole",
        )
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    weight = layer.decode(computed_in(model)) if isinstance(layer, QuantLinear) else layer.weight
    return Head(weight, layer.bias, scale, None if softcap is None else float(softcap))


def computed_in(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the hidden states: the model's own, which transformers reads off the first weight that is floating.

    Where the embedding is packed, that one belongs to an adapter, or to nothing.
    """
    embedding = model.get_input_embeddings()
    return embedding.weight_dtype if isinstance(embedding, QuantEmbedding) else model.dtype


def forward_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The decoder's output after its last norm, ``[1, N, H]``; no token sees another document.

    Args:
        model: A model from :func:`ingle.models.skeleton`.
        batch: Documents one after another in a single row.
    """
    return _packed(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)


def _packed(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    boundaries: dict[str, Tensor] = {}
    if model.config._attn_implementation == IMPLEMENTATION:
        # A four-dimensional mask is passed through as it is, so transformers builds none: our attention
        # reads the boundaries.  This one is a placeholder that attention recognises if they get lost.
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        boundaries = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    else:
        mask = _block_diagonal(cu_seqlens, input_ids.shape[1], computed_in(model))
    output = model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **boundaries
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _block_diagonal(cu_seqlens: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """An additive mask ``[1, 1, N, N]``: causal within each document, closed elsewhere."""
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    visible = (document[:, None] == document[None, :]) & (index[:, None] >= index[None, :])
    closed = torch.zeros(num_tokens, num_tokens, dtype=dtype, device=cu_seqlens.device)
    return closed.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


@torch.no_grad()
def verify(model: PreTrainedModel) -> None:
    """Compares the two halves with the whole on two tiny documents: packed, and side by side.

    It finds an architecture that does something unknown to its logits, or that lets packed documents see one
    another.

    Raises:
        ModelError: When they differ, the whole gives NaN or infinity, or the architecture cannot be asked so.
    """
    head_weight = head(model).weight
    lengths = (7, 5)
    ids = (torch.arange(sum(lengths)) * 7919 + 11) % head_weight.shape[0]
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    rows = nn.utils.rnn.pad_sequence(list(ids.split(lengths)), batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids, positions, cu_seqlens, rows, mask = (
        t.to(head_weight.device) for t in (ids, positions, cu_seqlens, rows, mask)
    )
    with _evaluating(model):
        try:
            hidden = _packed(model, ids[None], positions[None], cu_seqlens)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as refusal:
            if isinstance(refusal, RuntimeError) and model.config._attn_implementation == IMPLEMENTATION:
                raise  # our own attention failed, or the memory is full
            raise ModelError(
                f"{type(model).__name__} does not take packed documents.",
                where="model.id",
                why=f"{type(refusal).__name__}: {first_line(refusal)}",
                fix="choose a model of another architecture",
            ) from refusal
        ours = head(model).logits(hidden)[0].float()
        whole = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits[mask].float()
    if not torch.isfinite(whole).all():
        raise _not_finite(model)
    error = (ours - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-30)
    # The median of a document: a router on the edge may send a single token to another expert.
    worst = max(document.median().item() for document in error.split(lengths))
    if not worst <= _TOLERANCE.get(computed_in(model), 0.2):
        raise ModelError(
            f"{type(model).__name__} does not give the same logits packed as one document at a time.",
            where="model.id",
            why=f"they differ by {worst:.2%}; its head, its positions or its attention do something unknown",
            fix="choose a model of another architecture",
        )


def _not_finite(model: PreTrainedModel) -> ModelError:
    damaged = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not torch.isfinite(weight).all()
    ]
    if damaged:
        return ModelError(
            f"the weight {damaged[0]} holds NaN or infinity.",
            where="model.id",
            why=f"{len(damaged)} weights are affected",
            fix="fetch the checkpoint again, or choose another",
        )
    return ModelError(
        f"{type(model).__name__} answers with NaN or infinity, though all its weights are finite.",
        where="model.dtype",
        why=f"the values overflow in {str(computed_in(model)).removeprefix('torch.')}",
        fix="--model.dtype=float32",
    )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
