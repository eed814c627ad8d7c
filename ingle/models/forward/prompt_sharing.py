"""Tries whether a model computes a prompt once for all of its answers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ingle.kernels.attention.trees import Trees
from ingle.models.forward.hidden_states import computed_in, device_of, forward_packed, shares_prompts
from ingle.models.forward.layout import continuing_short_texts, layout_of
from ingle.models.kinds import kind_of
from ingle.models.text_part import text_config

#: Two prompts and their answers: lengths, and the document that each one continues.
_LENGTHS, _PARENTS = (9, 4, 7, 5, 2, 3), (-1, 0, 0, -1, 3, 3)
#: Largest relative difference of the hidden states of a token. Rounding to bfloat16 causes several per cent in deep
#: models; an answer that misses its prompt, or sees another answer, differs by as much as the states themselves.
_TOLERANCE = {torch.float32: 1e-3}
_ROUNDED_TOLERANCE = 0.2


@torch.no_grad()
def why_prompts_repeat(model: PreTrainedModel) -> str | None:
    """Returns why prompts are computed again for each of their answers; None if they are shared.

    Short trees are run with shared and with repeated prompts. All ranks call it together.

    Args:
        model: A model with weights, also sharded.
    """
    kind = kind_of(model.config)
    if kind == "encoder_decoder":  # sources are encoded once in layouts of packed documents
        return None if layout_of(model).kind in ("packed", "documents") else "it takes documents in padded rows"
    if kind != "causal":
        return "its tokens see later tokens"
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32)
    trees = Trees.of(bounds.tolist(), _PARENTS)
    assert trees is not None
    if not layout_of(model).computes_trees:
        return "it takes documents in padded rows, or with boundaries that cannot say which of them continue others"
    if not shares_prompts(model, trees):
        return "its rotary positions depend on the length of a text"
    num_ids = min(64, int(getattr(text_config(model.config), "vocab_size", 64)))
    device = device_of(model)
    paths = trees.paths.to(device)
    ids = ((torch.arange(trees.bounds[-1]) * 7919 + 11) % num_ids)[None]
    positions = torch.cat([start + torch.arange(n) for start, n in zip(trees.starts, _LENGTHS, strict=True)])[None]
    ids, positions, bounds = ids.to(device), positions.to(device), bounds.to(device)
    was_training = model.training
    model.train(False)
    try:
        with continuing_short_texts(model):
            shared = forward_packed(model, ids, positions, bounds, trees=trees)[0]
        alone = forward_packed(model, ids[:, paths.index_M], positions[:, paths.index_M], paths.cu_seqlens)[0]
    finally:
        model.train(was_training)
    wanted = alone[paths.place_N]
    errors_N = (shared - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1).clamp_min(1e-30)
    # The median of a document: rounding may make a router send a single token to another expert.
    worst = max(float(part.median()) for part in errors_N.split(_LENGTHS))
    if worst <= _TOLERANCE.get(computed_in(model), _ROUNDED_TOLERANCE):
        return None
    return f"its hidden states differ by {worst:.2%} if prompts are shared"
