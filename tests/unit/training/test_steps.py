"""A step's gradient does not depend on how it is cut; what is not finite stops the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ingle.config import OptimConfig
from ingle.data.batch import collate
from ingle.data.types import Batch, Sample
from ingle.errors import NonFiniteError
from ingle.training.optim import Optimizer, ParameterGroup
from ingle.training.steps import compute_gradients, random_seed, take_step


class Toy:
    """Sum over supervised tokens of a loss whose dropout depends on the random seed of the position."""

    def __init__(self, batches: Sequence[Batch], dropout: float = 0.0, poison: float | None = None) -> None:
        self.batches, self.dropout, self.poison = batches, dropout, poison

    def next_batch(self) -> Sequence[Batch]:
        return self.batches

    def weight(self, batch: Batch) -> float:
        return float(batch.num_supervised)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        output = nn.functional.dropout(model(batch.input_ids[0]), self.dropout).sum(-1)
        loss = (output * (batch.labels[0] >= 0)).square().sum()
        return loss if self.poison is None else loss * self.poison

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _documents() -> list[Sample]:
    rng = np.random.default_rng(0)
    documents = []
    for length, supervised in [(5, 2), (9, 8), (3, 1), (7, 5)]:
        ids = rng.integers(0, 11, length, dtype=np.int32)
        labels = ids.copy()
        labels[: length - supervised] = -100
        documents.append(Sample(ids, labels))
    return documents


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Embedding(11, 4)


def _gradient(batches: Sequence[Batch]) -> tuple[float, Tensor]:
    model = _model()
    loss = compute_gradients(model, Toy(batches), batches, seed=0, step=1)
    return loss, model.weight.grad


@pytest.mark.parametrize("cuts", [[4], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_gradient_is_the_same_for_every_cut_into_micro_batches(cuts: list[int]) -> None:
    documents = _documents()
    whole_loss, whole = _gradient([collate(documents)])
    edges = np.cumsum([0, *cuts])
    parts = [collate(documents[start:stop]) for start, stop in pairwise(edges)]
    loss, gradient = _gradient(parts)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(gradient, whole)


def test_dropout_is_a_function_of_the_position_in_the_run() -> None:
    batches = [collate(_documents())]
    objective = Toy(batches, dropout=0.5)

    def loss(step: int) -> float:
        return compute_gradients(_model(), objective, batches, seed=3, step=step)

    torch.rand(17)  # whatever the generator did before must not matter
    assert loss(5) == loss(5)
    assert loss(5) != loss(6)
    assert random_seed(3, 5, 0) != random_seed(3, 5, 1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_weights(poison: float) -> None:
    model = _model()
    before = model.weight.detach().clone()
    batches = [collate(_documents())]
    optimizer = Optimizer([ParameterGroup((("weight", model.weight),), 1.0, 0.0)], OptimConfig())
    with pytest.raises(NonFiniteError, match="step 7") as caught:
        take_step(model, Toy(batches, poison=poison), optimizer, lr=0.1, seed=0, step=7)
    assert "micro-batch 1 of 1" in str(caught.value)
    assert torch.equal(model.weight, before)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = _model()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    batches = [collate(_documents())]
    optimizer = Optimizer([ParameterGroup((("weight", model.weight),), 1.0, 0.0)], OptimConfig())
    with pytest.raises(NonFiniteError, match="weight holds values that are not finite"):
        take_step(model, Toy(batches), optimizer, lr=0.1, seed=0, step=1)


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    model = _model()
    model.weight.register_hook(lambda gradient: gradient * float("inf"))
    batches = [collate(_documents())]
    optimizer = Optimizer([ParameterGroup((("embedding.weight", model.weight),), 1.0, 0.0)], OptimConfig())
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"embedding\.weight"):
        take_step(model, Toy(batches), optimizer, lr=0.1, seed=0, step=2)
    assert torch.equal(model.weight, before)
