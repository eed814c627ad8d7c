"""The two halves of a language model: the decoder up to its last norm, and the output head.

The loss never materialises logits, so it needs the head's weight and not the head's module.  Architectures do
different things to their logits (scale, divide, cap); what is known is read from the config, and
:func:`ingle.models.verify` compares the halves with the whole once per load, so that nothing unknown goes unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.models.forward.attention import IMPLEMENTATION
from ingle.models.forward.padded_rows import lay_out
from ingle.quant import QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from ingle.data.batch import Batch


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
            f"The output head is a {type(layer).__name__}, not a linear layer.",
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
        model: A model from :func:`ingle.models.meta_model`.
        batch: Documents one after another in a single row.
    """
    return forward_packed(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)


def forward_packed(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """:func:`forward_hidden` on the tensors of a batch: ids and positions ``[1, N]``, boundaries ``[D + 1]``."""
    if model.config._attn_implementation == IMPLEMENTATION:
        # A four-dimensional mask is passed through as it is, so transformers builds none: our attention
        # reads the boundaries.  This one is a placeholder that attention recognises if they get lost.
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        output = model.base_model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden
    # An attention of its own may hold a mask of its own, which is no wider than the longest text it knows.
    layout = lay_out(cu_seqlens, width=getattr(model.config, "max_position_embeddings", None))
    output = model.base_model(
        input_ids=layout.spread(input_ids),
        attention_mask=layout.mask(computed_in(model)),
        position_ids=layout.spread(position_ids),
        use_cache=False,
    )
    return layout.gather(output.last_hidden_state)
