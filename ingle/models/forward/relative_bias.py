"""Relative position biases of packed documents, by distance instead of by pair of tokens.

T5 and its kin add ``[H, N, N]`` numbers to the scores of N tokens, although they depend on the distance only, and zeros
to those of cross-attention. For a packed row both would take more memory than the model. Attention of packed documents
takes ``[H, 2L - 1]`` numbers instead, L tokens in the longest document.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), section 2.1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.models.forward.documents import Boundaries
from ingle.models.forward.mixers import Class, original_class

_HAS_BIAS = "has_relative_attention_bias"


class BiasByDistance(nn.Module):
    """Goes before the class of an attention layer, as :class:`ingle.models.forward.dealt.Dealt` does."""

    original: Class
    _boundaries: Boundaries

    @property
    def has_relative_attention_bias(self) -> bool:
        """Whether the layer asks for a bias: over packed documents always, since it else makes zeros."""
        return self._boundaries.current is not None or bool(self.__dict__[_HAS_BIAS])

    def compute_bias(self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
        """Returns ``[1, H, 2L - 1]``, or ``[1, H, 0]`` for none; without documents what the layer itself computes."""
        layer: Any = super()
        documents = self._boundaries.current
        if documents is None:
            bias: Tensor = layer.compute_bias(query_length, key_length, device, past_seen_tokens)
            return bias
        if not self.__dict__[_HAS_BIAS]:
            return torch.empty(1, 0, 0, device=device)
        longest = documents.groups[0].real_DL.shape[1]
        earlier = layer.compute_bias(1, longest, device, longest - 1)
        later = layer.compute_bias(1, longest, device, 0)
        return torch.cat((earlier[:, :, 0, :-1], later[:, :, 0]), -1)


def use_distances(model: PreTrainedModel, boundaries: Boundaries) -> bool:
    """Computes relative position biases by distance from now on; returns whether the model has any.

    Args:
        model: A new model, whose attention takes boundaries.
        boundaries: Holds the documents of the batch.
    """
    found = [module for module in model.modules() if _HAS_BIAS in vars(module) and hasattr(module, "compute_bias")]
    for module in found:
        module.__class__ = _class_of(original_class(module))
        module.__dict__["_boundaries"] = boundaries
    return bool(found)


@functools.cache
def _class_of(cls: Class) -> type[nn.Module]:
    return type(cls.__name__, (BiasByDistance, cls), {"original": cls, "__doc__": cls.__doc__})
