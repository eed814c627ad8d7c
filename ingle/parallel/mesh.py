"""The mesh: the device of this process, and agreement between the ranks of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ingle import env
from ingle.config.parallel import ParallelConfig
from ingle.errors import ConfigError
from ingle.kernels.allocator import keep_freed_memory
from ingle.kernels.threads import set_threads

#: Enough for the shapes of one micro-batch, forward and backward; compiling one takes a third of a millisecond.
_CACHED_PRIMITIVES = 128


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of a run, as one process sees them. At present a run has one process.

    Attributes:
        device: Device of this process.
        dist_rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    device: torch.device
    dist_rank: int = 0
    world_size: int = 1

    def reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns the sum of each value over all ranks."""
        return dict(values)

    def agree(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank, so that all ranks stop or go on together."""
        return flag


def start(config: ParallelConfig) -> Mesh:
    """Picks the device, and sets the number of CPU threads and the memory management of this process.

    Raises:
        ConfigError: The config asks for a GPU, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "The config asks for a GPU, but PyTorch finds none on this machine.",
            where="parallel.device = cuda",
            why=f"torch {torch.__version__} sees no CUDA device",
            fix="--parallel.device=cpu, or install a CUDA build of PyTorch",
        )
    if config.num_threads is not None:
        set_threads(config.num_threads)
    keep_freed_memory()
    env.restore_garbage_collection()
    env.limit_primitive_caches(_CACHED_PRIMITIVES)
    return Mesh(torch.device("cpu") if config.device == "cpu" else pick_device())


def pick_device() -> torch.device:
    """Returns the GPU of this process if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
