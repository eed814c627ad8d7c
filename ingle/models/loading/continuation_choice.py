"""Finds out which recurrent modules compute answers from the state of their prompt, by trying a tiny copy.

Some ignore a state that they get together with several tokens, and some write it in place, which gradients cannot pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ingle.kernels.attention.trees import Trees
from ingle.models.forward.continued import cache_argument
from ingle.models.forward.dealt import argument_names
from ingle.models.forward.hidden_states import forward_packed
from ingle.models.forward.layout import Layout, apply_layout, continuing_short_texts, layout_of
from ingle.models.forward.mixers import find_mixers, original_class
from ingle.models.forward.rotary_by_length import rotate_by_document

#: Prompts of two lengths with their answers, one of a single token, and a document alone: lengths and parents.
_LENGTHS, _PARENTS = (9, 4, 7, 5, 1, 3, 6, 8), (-1, 0, 0, -1, 3, 3, 3, -1)
#: Largest relative difference of a token's hidden states, and of the gradient of a weight, in float32.
_TOLERANCE, _GRADIENT_TOLERANCE = 1e-4, 1e-3

_Found = tuple[Tensor, tuple[Tensor, ...]]


def choose_continuation(model: PreTrainedModel, layout: Layout) -> Layout:
    """Returns the layout with ``continued``.

    Args:
        model: A small causal model; it is copied.
        layout: An exact layout of its architecture.
    """
    mixers = find_mixers(model)
    classes = {original_class(model.get_submodule(name)) for name, mixing in mixers.items() if mixing == "state"}
    candidates = sorted(cls.__name__ for cls in classes if cache_argument(argument_names(cls)))
    if not candidates or layout.kind not in ("packed", "documents"):
        return layout
    try:
        repeated = _compute(model, layout)
    except Exception:  # prompts are not shared at all
        return layout
    return replace(layout, continued=tuple(name for name in candidates if _agrees(model, layout, name, repeated)))


def _agrees(model: PreTrainedModel, layout: Layout, name: str, repeated: _Found) -> bool:
    try:
        hidden, gradients = _compute(model, replace(layout, continued=(name,)))
    except Exception:  # architectures fail in many ways if they get what they do not expect
        return False
    error = (hidden - repeated[0]).norm(dim=-1) / repeated[0].norm(dim=-1).clamp_min(1e-30)
    floor = 1e-2 * max(float(gradient.norm()) for gradient in repeated[1])
    worst = max(
        float((ours - theirs).norm() / theirs.norm().clamp_min(floor))
        for ours, theirs in zip(gradients, repeated[1], strict=True)
    )
    return float(error.max()) <= _TOLERANCE and worst <= _GRADIENT_TOLERANCE


@torch.enable_grad()
def _compute(model: PreTrainedModel, layout: Layout) -> _Found:
    """Returns the hidden states of trees, and the gradients of a weighted sum of them."""
    model = copy.deepcopy(model)
    apply_layout(model, layout)
    rotate_by_document(model)
    model.requires_grad_(True)
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32)
    trees = Trees.of(bounds.tolist(), _PARENTS)
    assert trees is not None and layout_of(model).computes_trees
    num_ids = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    ids = (torch.arange(trees.bounds[-1]) * 7919 + 11) % num_ids
    positions = torch.cat([start + torch.arange(n) for start, n in zip(trees.starts, _LENGTHS, strict=True)])
    with continuing_short_texts(model):
        hidden = forward_packed(model, ids[None], positions[None], bounds, trees=trees)[0]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))
    parameters = list(model.parameters())
    gradients: Sequence[Tensor | None] = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
    return hidden.detach(), tuple(gradient for gradient in gradients if gradient is not None)
