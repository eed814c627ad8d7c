"""The load-balancing loss of mixtures of experts.

With p the softmax of the router logits, f_e the share of tokens that have expert e among their top k, and P_e the mean
of p_e, both over all tokens and layers, the loss is ``E * sum_e f_e P_e``: k if the experts are used equally, and more
otherwise.

It is a product of two means, so it is no sum over documents. Like transformers, Ingle computes it for each
micro-batch; a step takes the mean over its micro-batches, weighted by their tokens. It is never part of the loss of a
document. A token of a prompt that several answers share counts once for each of them, as if it were repeated.

Source: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), equations 4 to 6; transformers'
``load_balancing_loss_func``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ingle.config.run import Run
from ingle.data.batch import Batch
from ingle.errors import ConfigError
from ingle.models import Model, Routers, find_routers
from ingle.models.forward.layout import layout_of
from ingle.objectives.interface import StepModule, Sums, Term


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


def balanced(module: StepModule, routers: Routers | None, weight: float) -> StepModule:
    """Returns a module that also balances the load of routers; the same module without routers.

    Args:
        module: Any objective over the output head of the model.
        routers: The routers, as :func:`choose_routers` found them.
        weight: Weight of their loss.
    """
    return module if routers is None else Balanced(module, routers, weight)


class Balanced(StepModule):
    """An objective with the load-balancing loss as one more term, ``router_loss``.

    Args:
        inner: The objective.
        routers: The routers of its model.
        weight: Weight of their loss.
    """

    uses_hooks = True

    def __init__(self, inner: StepModule, routers: Routers, weight: float) -> None:
        super().__init__(inner.model)
        self.inner = inner
        self.measures, self.row_measures = inner.measures, inner.row_measures
        self.keeps_dropout, self.reads_head_in_backward = inner.keeps_dropout, inner.reads_head_in_backward
        self.reads_states = inner.reads_states
        self._routers, self._weight = routers, weight

    @property
    def terms(self) -> Sequence[Term]:
        """The terms of the objective, and that of the routers."""
        return (*self.inner.terms, Term("router_loss", "routed_tokens", self._weight))

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the counts of the objective, and the tokens with shared prompts repeated."""
        return {**self.inner.counts(batch), "routed_tokens": float(_weights(batch).sum())}

    def compute(self, batch: Batch) -> Sums:
        """Returns the sums of the objective, and the load-balancing loss times the number of tokens."""
        with self._routers.recorded() as logits:
            sums = self.inner.compute(batch)
        weights_N = _weights(batch)
        if batch.parents() is not None and len(logits[0]) != batch.input_ids.shape[1]:
            # The model itself repeats prompts that it cannot share.
            weights_N = weights_N.new_ones(int(weights_N.sum()))
        balance = balance_loss(logits, self._routers.top_k, weights_N)
        return replace(sums, losses={**sums.losses, "router_loss": balance * weights_N.sum()})

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the figures of the objective: the load of routers is never part of the loss of a document."""
        return self.inner.per_document(batch)

    def log_ratios(self, batch: Batch) -> Tensor | None:
        """Returns those of the objective."""
        return self.inner.log_ratios(batch)

    def start_sums(self, batch: Batch) -> Mapping[str, float]:
        """Returns those of the objective."""
        return self.inner.start_sums(batch)


def balance_loss(logits: Sequence[Tensor], top_k: int, weights_N: Tensor) -> Tensor:
    """Returns the load-balancing loss of one micro-batch, a float32 scalar.

    Args:
        logits: Of each router, ``[N, E]``.
        top_k: Experts per token.
        weights_N: How often each token counts, int64; tokens behind them are padding.
    """
    # A micro-batch without tokens, which keeps ranks in step, gets weight 0 but must not be NaN.
    num_tokens = max(1, len(weights_N))
    shares = torch.cat([each[:num_tokens].float() for each in logits]).softmax(-1)
    num_experts = shares.shape[-1]
    chosen = shares.topk(top_k, dim=-1).indices
    if not bool((weights_N > 1).any()):
        used = torch.bincount(chosen.flatten(), minlength=num_experts) / len(shares)
        return num_experts * (used * shares.mean(0)).sum()
    weights = weights_N.repeat(len(logits)).float()
    total = weights.sum()
    used = torch.bincount(chosen.flatten(), weights.repeat_interleave(top_k), minlength=num_experts) / total
    return num_experts * (used * (shares * weights[:, None]).sum(0) / total).sum()


def _weights(batch: Batch) -> Tensor:
    """Returns how many answers read each token, int64 [N] without padding."""
    return batch.multiplicity()[: batch.num_tokens]
