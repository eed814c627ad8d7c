"""Scores of answers: the head of a model that classifies, read at the last token of each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ingle.kernels.attention.trees import Trees
from ingle.models.forward.hidden_states import call_packed, shares_prompts
from ingle.models.forward.layout import layout_of
from ingle.models.forward.mixers import base_of
from ingle.models.forward.task_heads import compute_task
from ingle.models.forward.to_head import taken
from ingle.models.forward.virtual_tokens import extend_batch
from ingle.models.kinds import kind_of

if TYPE_CHECKING:
    from ingle.data.batch import Batch


def scores_by_position(model: PreTrainedModel) -> bool:
    """Returns whether the score of an answer is read at its last token; otherwise the architecture pools it."""
    packed = layout_of(model).kind not in ("rows", "equal_rows")
    return packed and kind_of(model.config) == "causal" and hasattr(model, "score")


def forward_reward(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the score of each answer, float32 [A], in the order of ``batch.answers()``.

    A causal model is read at the last token of each answer, whatever that token is; its prompt is computed once for all
    answers of a tree. Other models read whole texts, and pool them as their architecture does.

    Args:
        model: A model that classifies into one number, with weights.
        batch: Documents packed in a single row. A batch without documents has the score of its first one.
    """
    batch, _ = extend_batch(model, batch)
    bounds, parents = batch.cu_seqlens, batch.parents()
    answers = batch.answers() if batch.num_documents else torch.zeros(1, dtype=torch.int64, device=bounds.device)
    trees = None if parents is None else Trees.of(bounds.tolist(), parents[: len(bounds) - 1])
    if not scores_by_position(model) or (trees is not None and not shares_prompts(model, trees)):
        scores_A = compute_task(model, batch)[answers, 0]
        return scores_A.to(torch.promote_types(scores_A.dtype, torch.float32))

    def run(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
        base = base_of(model)
        hidden: Tensor = base(**taken(base, arguments)).last_hidden_state
        return hidden

    hidden_1NH = call_packed(model, batch.input_ids, batch.position_ids, bounds, run, None, trees)
    head: Any = model
    scores_A1: Tensor = head.score(hidden_1NH[0, bounds[1:].long()[answers] - 1])
    return scores_A1[:, 0].to(torch.promote_types(scores_A1.dtype, torch.float32))
