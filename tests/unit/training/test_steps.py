"""A step's gradient does not depend on how it is cut; values that are not finite stop the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ingle.config import OptimConfig
from ingle.data.batch import Batch, collate
from ingle.data.packing import Indices
from ingle.data.types import Sample
from ingle.errors import NonFiniteError
from ingle.objectives import Measure, Objective, StepModule, Sums, Term
from ingle.parallel import Mesh
from ingle.training.optim import Optimizer, ParameterGroup
from ingle.training.steps import compute_gradients, random_seed, take_step, weighted_mean

MESH = Mesh(torch.device("cpu"))


class ToyModule(StepModule):
    """A loss over supervised tokens, one over documents, and a metric."""

    terms = (Term("tokens", "supervised_tokens"), Term("firsts", "documents", weight=0.25))
    measures = (Measure("squares", "tokens"),)

    def __init__(self, model: nn.Module, dropout: float = 0.0, poison: float = 1.0) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.dropout, self.poison = dropout, poison

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"supervised_tokens": batch.num_supervised, "documents": batch.num_documents}

    def compute(self, batch: Batch) -> Sums:
        output = nn.functional.dropout(self.model(batch.input_ids[0]), self.dropout).sum(-1)
        loss = (output * (batch.labels[0] >= 0)).square().sum() * self.poison
        firsts = output[batch.cu_seqlens[:-1].long()].pow(4).sum()
        return Sums({"tokens": loss, "firsts": firsts}, {"squares": output.detach().square().sum()})

    def per_document(self, batch: Batch) -> Tensor:
        raise NotImplementedError


class Toy(Objective):
    epoch = 0.0

    def __init__(self, batches: Sequence[Batch], module: ToyModule) -> None:
        self.batches, self.module = batches, module

    def next_batches(self) -> Sequence[Batch]:
        return self.batches

    def held_out_batches(self) -> Iterator[tuple[Indices, Batch]]:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class OneOfTwo(Mesh):
    """A rank whose peer counts and sums what it is given."""

    peer: Mapping[str, float]

    def reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: value + self.peer[name] for name, value in values.items()}


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


def _gradient(batches: Sequence[Batch], mesh: Mesh = MESH) -> tuple[float, Tensor]:
    model = _model()
    objective = Toy(batches, ToyModule(model))
    sums, counts = compute_gradients(objective, batches, mesh, seed=0, step=1)
    return weighted_mean(ToyModule.terms, sums, counts), model.weight.grad


def _optimizer(weight: nn.Parameter, name: str = "weight") -> Optimizer:
    return Optimizer([ParameterGroup(((name, weight),), 1.0, 0.0)], OptimConfig())


@pytest.mark.parametrize("cuts", [[4], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_gradient_is_the_same_for_every_cut_into_micro_batches(cuts: list[int]) -> None:
    documents = _documents()
    whole_loss, whole = _gradient([collate(documents)])
    edges = np.cumsum([0, *cuts])
    parts = [collate(documents[start:stop]) for start, stop in pairwise(edges)]
    loss, gradient = _gradient(parts)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(gradient, whole)


def test_each_term_is_a_mean_over_its_own_denominator() -> None:
    documents = _documents()
    model = _model()
    means = []
    for document in documents:
        output = model(torch.from_numpy(document.input_ids).long()).sum(-1)
        means.append((output[torch.from_numpy(document.labels) >= 0].square(), output[0].pow(4)))
    expected = torch.cat([tokens for tokens, _ in means]).mean() + torch.stack([first for _, first in means]).mean() / 4
    loss, gradient = _gradient([collate(documents[:1]), collate(documents[1:])])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.weight)[0])


def test_gradients_of_two_ranks_add_up_to_that_of_one() -> None:
    documents = _documents()
    _, whole = _gradient([collate(documents)])
    halves = [collate(documents[:3]), collate(documents[3:])]
    total = torch.zeros_like(whole)
    for own, peer in (halves, halves[::-1]):
        mesh = OneOfTwo(torch.device("cpu"), world_size=2)
        counts = {"tokens": peer.num_tokens, "supervised_tokens": peer.num_supervised, "documents": peer.num_documents}
        object.__setattr__(mesh, "peer", counts | {"firsts": 0.0, "squares": 0.0})
        total += _gradient([own], mesh)[1]
    torch.testing.assert_close(total, whole)


def test_a_step_without_a_supervised_token_has_no_gradient_and_no_nan() -> None:
    documents = [Sample(sample.input_ids, np.full_like(sample.labels, -100)) for sample in _documents()]
    term = [Term("tokens", "supervised_tokens")]
    objective = Toy([collate(documents)], ToyModule(_model()))
    sums, counts = compute_gradients(objective, objective.batches, MESH, seed=0, step=1)
    assert weighted_mean(term, sums, counts) == 0


def test_the_result_of_a_step_has_the_loss_the_tokens_and_the_metrics() -> None:
    model = _model()
    batches = [collate(_documents()[:2]), collate(_documents()[2:])]
    result = take_step(Toy(batches, ToyModule(model)), _optimizer(model.weight), MESH, lr=0.1, seed=0, step=1)
    output = _model()(torch.cat([batch.input_ids[0] for batch in batches])).sum(-1)
    assert result.num_tokens == 24
    firsts = torch.cat([batch.cu_seqlens[:-1].long() + offset for batch, offset in zip(batches, (0, 14), strict=True)])
    assert result.metrics == {
        "firsts": pytest.approx(output[firsts].pow(4).mean().item(), rel=1e-6),
        "squares": pytest.approx(output.square().mean().item(), rel=1e-6),
    }


def test_dropout_is_a_function_of_the_position_in_the_run() -> None:
    batches = [collate(_documents())]

    def loss(step: int) -> float:
        objective = Toy(batches, ToyModule(_model(), dropout=0.5))
        return compute_gradients(objective, batches, MESH, seed=3, step=step)[0]["tokens"]

    torch.rand(17)  # whatever the generator did before must not matter
    assert loss(5) == loss(5)
    assert loss(5) != loss(6)
    assert random_seed(3, 5, 0) != random_seed(3, 5, 1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_weights(poison: float) -> None:
    model = _model()
    before = model.weight.detach().clone()
    objective = Toy([collate(_documents())], ToyModule(model, poison=poison))
    with pytest.raises(NonFiniteError, match="step 7") as caught:
        take_step(objective, _optimizer(model.weight), MESH, lr=0.1, seed=0, step=7)
    assert "micro-batch 1 of 1" in str(caught.value)
    assert torch.equal(model.weight, before)


def test_a_loss_that_is_not_finite_on_another_rank_stops_this_one() -> None:
    failures, damaged = [None, (float("nan"), "micro-batch 2 of 2, 9 tokens")], [None, None]
    answers = [failures, damaged]

    class Peer(Mesh):
        def gather(self, value: Any) -> list[Any]:
            return answers.pop(0)

    model = _model()
    objective = Toy([collate(_documents())], ToyModule(model))
    with pytest.raises(NonFiniteError, match=r"became nan at step 1.*\n.*micro-batch 2 of 2"):
        take_step(objective, _optimizer(model.weight), Peer(MESH.device), lr=0.1, seed=0, step=1)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = _model()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    objective = Toy([collate(_documents())], ToyModule(model))
    with pytest.raises(NonFiniteError, match="weight contains values that are not finite"):
        take_step(objective, _optimizer(model.weight), MESH, lr=0.1, seed=0, step=1)


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    model = _model()
    model.weight.register_hook(lambda gradient: gradient * float("inf"))
    objective = Toy([collate(_documents())], ToyModule(model))
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"embedding\.weight"):
        take_step(objective, _optimizer(model.weight, "embedding.weight"), MESH, lr=0.1, seed=0, step=2)
    assert torch.equal(model.weight, before)
