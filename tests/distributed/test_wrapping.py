"""Sharded modules whose parameters FSDP alone cannot handle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ingle import parallel
from ingle.parallel import Mesh
from ingle.planning import Strategy
from tests.distributed.ranks import run_ranks


class Scaled(nn.Module):
    """A linear map with one trained and one frozen number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.trained = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.trained * self.frozen).sum()


class Repeats(nn.Module):
    """Calls what is inside it for every row, and reads a table that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated = nn.Sequential(nn.Linear(3, 3))
        self.repeated.forward = self._repeat  # type: ignore[method-assign]
        self.table = nn.Embedding(4, 3)
        self.output = nn.Linear(3, 1)

    def _repeat(self, x: Tensor) -> Tensor:
        return torch.stack([self.repeated[0](row) for row in x])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.repeated(x) * nn.functional.layer_norm(self.table.weight, (3,))[1]
        return self.output(hidden).square().sum()


def _gradients_of_repeats(mesh: Mesh) -> dict[str, list[float]]:
    """Returns the gradients of three rows, two of which one rank has."""
    torch.manual_seed(0)
    module = Repeats()
    strategy = Strategy("zero3" if mesh.world_size > 1 else "none", mesh.world_size, mesh.world_size)
    parallel.wrap(module, [], mesh, strategy, dtype=torch.float32, whole={module.repeated}, read={module.table})
    parallel.require_sharded_base(module, mesh.world_size)
    for _ in range(2):  # the second step begins with what the first one leaves
        module.zero_grad()
        module(torch.arange(9.0).view(3, 3)[mesh.dist_rank :: mesh.world_size]).backward()
    found = [(name, parameter.grad) for name, parameter in module.named_parameters()]
    return {name: parallel.full(grad).flatten().tolist() for name, grad in found if grad is not None}


def test_ranks_may_call_parts_of_a_unit_different_numbers_of_times() -> None:
    expected = _gradients_of_repeats(Mesh(torch.device("cpu")))
    assert len(expected) == 5
    for found in run_ranks(2, _gradients_of_repeats):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def _gradients(mesh: Mesh) -> dict[str, list[float]]:
    """Returns the gradients of two rows, which the ranks share if there are two of them."""
    torch.manual_seed(0)
    module = nn.Sequential(Scaled())
    strategy = Strategy("zero3" if mesh.world_size > 1 else "none", mesh.world_size, mesh.world_size)
    parallel.wrap(module, [], mesh, strategy, dtype=torch.float32)
    parallel.require_sharded_base(module, mesh.world_size)
    module(torch.arange(6.0).view(2, 3)[mesh.dist_rank :: mesh.world_size]).backward()
    parallel.sum_gradients(module.parameters(), mesh)
    trained = [(name, parameter.grad) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {name: parallel.full(grad).flatten().tolist() for name, grad in trained if grad is not None}


def test_parameters_without_rows_stay_on_every_rank() -> None:
    expected = _gradients(Mesh(torch.device("cpu")))
    assert len(expected) == 3
    for found in run_ranks(2, _gradients):
        torch.testing.assert_close(found, expected)
