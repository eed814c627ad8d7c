"""The mesh: the device of this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ingle import env
from ingle.config.parallel import ParallelConfig
from ingle.errors import ConfigError
from ingle.kernels.allocator import keep_freed_memory
from ingle.kernels.threads import set_threads

#: Enough for the shapes of one micro-batch, forward and backward; making one anew takes a third of a millisecond.
_CACHED_PRIMITIVES = 128


@dataclass(frozen=True, slots=True)
class Mesh:
    """The devices of a run as one process sees them.

    Attributes:
        device: Where this process computes.
    """

    device: torch.device


def start(config: ParallelConfig) -> Mesh:
    """Picks the device, sets the number of CPU threads and how this process treats its memory.

    Raises:
        ConfigError: When a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "A GPU was asked for and this machine has none that PyTorch can use.",
            where="parallel.device = cuda",
            why=f"torch {torch.__version__} sees no CUDA device",
            fix="--parallel.device=cpu, or install a CUDA build of PyTorch",
        )
    if config.num_threads is not None:
        set_threads(config.num_threads)
    keep_freed_memory()
    env.restore_garbage_collection()
    env.limit_primitive_caches(_CACHED_PRIMITIVES)
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return Mesh(torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu"))
