"""What no file of a model holds: rotary frequencies and masks, computed by the architecture's own code."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


def compute(
    skeleton: PreTrainedModel, device: torch.device, *, known: Collection[str] = (), seed: int = 0
) -> list[str]:
    """Gives values to the buffers of a skeleton, and to the parameters that no file holds, in place.

    Its other parameters stay on the meta device, flagged as initialised.

    Args:
        skeleton: A pristine architecture on the meta device.
        device: Where the values go.
        known: Names of parameters and buffers that have values elsewhere.
        seed: Of what is drawn.

    Returns:
        The names that have values now.
    """
    for parameter in skeleton.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    names = [name for name, _ in skeleton.named_buffers() if name not in known]
    names += [name for name, _ in skeleton.named_parameters() if name not in known]
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        empty = torch.empty_like(getattr(owner, leaf), device=device)
        if leaf in owner._buffers:
            owner._buffers[leaf] = empty
        else:
            owner._parameters[leaf] = torch.nn.Parameter(empty)
    with seeded(seed):
        skeleton.initialize_weights()
    return names


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from a seed inside, and leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
