"""Modules that would let chance, or the content of other documents, change a bit of a document's results."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ingle.models.forward.dealt import Evaluating, put_before
from ingle.quant import LEAST_ROWS, is_fused_experts

#: Settings of modules that drop tokens in training: by chance, or when an expert has as many as it may from the batch.
_DROPPING = re.compile(r"jitter|expert_capacity|moe_token_dropout")


class _FullGroups(nn.Module):
    """Goes before a class of fused experts: on a CPU, every expert that is used gets :data:`LEAST_ROWS` rows."""

    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Takes ``[S, H]``, ``[S, K]`` and ``[S, K]``; returns ``[S, H]``."""
        call: Callable[[Tensor, Tensor, Tensor], Tensor] = super().forward
        if hidden_states.device.type != "cpu":
            return call(hidden_states, top_k_index, top_k_weights)
        experts, counts = top_k_index[top_k_index < self.num_experts].unique(return_counts=True)
        more = experts.repeat_interleave((LEAST_ROWS - counts).clamp_min(0))
        if not len(more):
            return call(hidden_states, top_k_index, top_k_weights)
        width = top_k_index.shape[-1]
        rest = -len(more) % width
        more = torch.cat((more, more[-1:].expand(rest))).view(-1, width)
        rows = (0, 0, 0, len(more))
        output: Tensor = call(pad(hidden_states, rows), torch.cat((top_k_index, more)), pad(top_k_weights, rows))
        return output[: len(hidden_states)]


def isolate(model: nn.Module) -> None:
    """Removes what makes the results of a document depend on chance or on other documents.

    Routers add no noise in training, as adapters have a dropout of their own, and their experts take all tokens, as in
    evaluation: else the tokens of one document would displace those of another. Products with few rows use other
    kernels, which round in another way, so that the number of tokens at an expert would matter.

    Args:
        model: A new model of any device.
    """
    for module in model.modules():
        if any(map(_DROPPING.search, vars(module))):
            put_before(Evaluating, module)
        if is_fused_experts(module):
            put_before(_FullGroups, module)
