"""Random subspaces: the maps are linear, adjoint and of unit columns; their gradients are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ingle.config import OptimConfig
from ingle.config.optim import Subspace
from ingle.training.projections import Fastfood, IndexMap, Projection, hadamard
from ingle.training.subspace import COORDINATES, GAINS, SubspaceOptimizer

SIZES = [300, 64, 7]
MAPS = {"fastfood": Fastfood, "index": IndexMap}


def _dense(projection: Projection, index: int, dim: int) -> Tensor:
    """P of a tensor, column by column."""
    columns = [projection.apply(index, column) for column in torch.eye(dim, dtype=torch.float64)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("bits", [0, 3, 9])
def test_hadamard_transform(bits: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    values = torch.randn(1 << bits, dtype=torch.float64)
    torch.testing.assert_close(hadamard(values), matrix @ values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dim", [1, 16, 40])
def test_a_map_and_its_adjoint(kind: str, dim: int) -> None:
    projection = MAPS[kind](SIZES, dim, 5)
    again = MAPS[kind](SIZES, dim, 5)
    for index, size in enumerate(SIZES):
        weights = torch.randn(size, dtype=torch.float64)
        dense = _dense(projection, index, dim)
        torch.testing.assert_close(projection.adjoint(index, weights), dense.T @ weights, rtol=1e-10, atol=1e-12)
        assert torch.equal(dense, _dense(again, index, dim))
    assert not torch.equal(dense, _dense(MAPS[kind](SIZES, dim, 6), index, dim))


def test_fastfood_has_columns_of_unit_length_that_are_nearly_orthogonal() -> None:
    dense = torch.cat([_dense(Fastfood([3000, 2500], 64, 0), index, 64) for index in range(2)])
    assert torch.all((dense.norm(dim=0) - 1).abs() < 0.06)
    assert (dense.T @ dense - torch.eye(64)).abs().max() < 0.15


def test_all_coordinates_move_a_small_tensor_of_fastfood() -> None:
    assert torch.all(_dense(Fastfood([7], 40, 0), 0, 40).norm(dim=0) > 0.5)


def test_the_index_map_keeps_lengths() -> None:
    dense = torch.cat([_dense(IndexMap(SIZES, 16, 5), index, 16) for index in range(len(SIZES))])
    torch.testing.assert_close(dense.T @ dense, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.all((dense != 0).sum(1) == 1)


@pytest.mark.parametrize("kind", MAPS)
def test_a_task_of_some_directions_needs_about_as_many(kind: str) -> None:
    """Least squares whose loss depends on 24 directions of 600 weights: d random ones explain d / 24 of it."""
    generator = torch.Generator().manual_seed(0)
    design = torch.linalg.qr(torch.randn(600, 24, generator=generator, dtype=torch.float64))[0].T
    explained = {}
    for dim in (6, 12, 24, 48):
        dense = _dense(MAPS[kind]([600], dim, 1), 0, dim)
        columns = torch.linalg.qr(design @ dense)[0]
        targets = torch.randn(24, 400, generator=generator, dtype=torch.float64)
        explained[dim] = float((columns.T @ targets).square().sum() / targets.square().sum())
    assert explained[6] == pytest.approx(0.25, abs=0.05)
    assert explained[12] == pytest.approx(0.5, abs=0.05)
    assert explained[24] == pytest.approx(1.0) == explained[48]


class _Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(12, 5, generator=generator).to(dtype))
        self.second = nn.Parameter(torch.randn(3, 12, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, rows: Tensor) -> Tensor:
        return (torch.tanh(rows @ self.first.T) @ self.second.T + self.bias).square().sum()


def _optimizer(net: _Net, kind: str, gains: bool) -> SubspaceOptimizer:
    config = OptimConfig.model_validate({"rule": {"kind": "subspace", "dim": 9, "gains": gains}, "lr": 1e-2})
    assert isinstance(config.rule, Subspace)
    return SubspaceOptimizer(list(net.named_parameters()), config, config.rule, kind)


@pytest.mark.parametrize("kind", MAPS)
def test_gradients_are_those_of_central_differences(kind: str) -> None:
    net = _Net()
    optimizer = _optimizer(net, kind, gains=True)
    rows = torch.randn(4, 5, dtype=torch.float64)
    z, gains = (value for _, value in optimizer.named_masters())
    with torch.no_grad():
        z.copy_(torch.randn(9, dtype=torch.float64) / 3)
        gains.copy_(torch.tensor([0.5, 1.5, -1.0]))
    optimizer._push()
    for part in rows.split(3):  # two micro-batches
        net(part).backward()
    for value, gradient in ((z, z.grad), (gains, gains.grad)):
        assert gradient is not None
        numeric = torch.zeros_like(value)
        for place in range(len(value)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    value[place] += sign * 1e-6
                    optimizer._push()
                    ends.append(net(rows).item())
                    value[place] -= sign * 1e-6
            numeric[place] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gains", [False, True])
def test_training_stays_in_the_subspace_and_resumes_bit_for_bit(gains: bool) -> None:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))

    def train(net: _Net, optimizer: SubspaceOptimizer, steps: int) -> None:
        for _ in range(steps):
            net(rows).backward()
            optimizer.clip()
            optimizer.step(1e-2)
            optimizer.clear()

    whole, half, fresh = (_Net(torch.float32) for _ in range(3))
    start = whole.first.detach().clone()
    full = _optimizer(whole, "index", gains)
    before = whole(rows).item()
    train(whole, full, 6)
    assert whole(rows).item() < before
    state = full.state_dict()
    gain = state[f"master.{GAINS}"][0] if gains else 1.0
    moved = IndexMap([60, 36, 3], 9, 0).apply(0, state[f"master.{COORDINATES}"]) * gain
    torch.testing.assert_close(whole.first.detach(), start + moved.view(12, 5))

    first = _optimizer(half, "index", gains)
    train(half, first, 3)
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    continued = _optimizer(fresh, "index", gains)
    continued.load_state_dict(kept)
    train(fresh, continued, 3)
    assert torch.equal(fresh.first, whole.first)
    assert full.num_parameters == 9 + 3 * gains
