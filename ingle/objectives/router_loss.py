"""The load-balancing loss of mixtures of experts.

With p the softmax of the router logits, f_e the share of tokens that have expert e among their top k, and P_e the mean
of p_e, both over all tokens and layers, the loss is ``E * sum_e f_e P_e``: k if the experts are used equally, and more
otherwise.

It is a product of two means, so it is no sum over documents. Like transformers, Ingle computes it for each
micro-batch; a step takes the mean over its micro-batches, weighted by their tokens. It is never part of the loss of a
document.

Source: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), equations 4 to 6; transformers'
``load_balancing_loss_func``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ingle.config.run import Run
from ingle.errors import ConfigError
from ingle.models import Model, Routers, find_routers
from ingle.models.forward.layout import layout_of


def choose_routers(run: Run, model: Model) -> tuple[Routers | None, float]:
    """Returns the routers whose load is balanced in a run, and the weight of their loss; None and 0 without it.

    Raises:
        ConfigError: A weight is set and the architecture defines no such loss, or documents are padded.
    """
    option = run.train.router_loss
    if option == "off" or option == 0 or (option == "auto" and run.adapter.kind != "none"):
        return None, 0.0
    routers = find_routers(model)
    if routers is not None and layout_of(model).kind in ("rows", "equal_rows"):
        raise ConfigError(
            f"{type(model).__name__} takes documents in padded rows, for which the load of its experts is not counted.",
            where="train.router_loss",
            fix="--train.router_loss=off",
        )
    if option == "auto":
        return (routers, routers.coefficient) if routers is not None and routers.coefficient else (None, 0.0)
    if routers is None:
        raise ConfigError(
            f"{type(model).__name__} defines no load-balancing loss.",
            where=f"train.router_loss = {option}",
            why="it has no routers, or they are balanced by a bias that is not trained",
            fix="--train.router_loss=auto",
        )
    return routers, option


def balance_loss(logits: Sequence[Tensor], top_k: int, num_tokens: int) -> Tensor:
    """Returns the load-balancing loss of one micro-batch, a float32 scalar.

    Args:
        logits: Of each router, ``[N, E]``.
        top_k: Experts per token.
        num_tokens: Tokens at the start of each tensor that count; the rest is padding.
    """
    # A micro-batch without tokens, which keeps ranks in step, gets weight 0 but must not be NaN.
    shares = torch.cat([each[: max(1, num_tokens)].float() for each in logits]).softmax(-1)
    num_experts = shares.shape[-1]
    chosen = shares.topk(top_k, dim=-1).indices.flatten()
    used = torch.bincount(chosen, minlength=num_experts) / len(shares)
    return num_experts * (used * shares.mean(0)).sum()
