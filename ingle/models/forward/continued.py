"""Lets recurrent modules compute the answers to a prompt from the state that the prompt leaves.

Prompts run first, in groups of equal length, since a state must not run through padding; then their answers do. The
states are ordinary tensors, so gradients pass from the answers to the prompt. It works for modules that read the
states of both their convolution and their recurrence from a cache of transformers, whatever the number of new tokens:
:mod:`ingle.models.loading.continuation_choice` tries which do.

Legend: as in :mod:`ingle.models.forward.documents`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ingle.kernels.attention.trees import Trees
from ingle.models.forward.documents import Documents, Group, by_length
from ingle.models.forward.mixers import CACHES

#: States by what they are of and their index.
_States = dict[tuple[str, int], Tensor]


@dataclass(frozen=True, slots=True)
class Steps:
    """Documents of trees in the order in which they can be computed.

    Attributes:
        documents: All documents, each dealt once. The groups are the steps.
        numbers: The documents in each group.
        parents: The document that each of them continues; -1 for none.
    """

    documents: Documents
    numbers: tuple[tuple[int, ...], ...]
    parents: tuple[int, ...]

    @classmethod
    def of(cls, trees: Trees, device: torch.device, *, padding: float) -> Steps:
        """Groups the documents by depth, those that others continue by equal length.

        Args:
            trees: Which documents continue others.
            device: Where the groups are.
            padding: Padded places per token that a group of documents may have which none continues.
        """
        lengths = [stop - start for start, stop in pairwise(trees.bounds)]
        inner = set(trees.parents)
        numbers: list[tuple[int, ...]] = []
        for depth in range(max(trees.depths) + 1):
            for is_inner in (True, False):
                chosen = [
                    (length, number)
                    for number, length in enumerate(lengths)
                    if length and trees.depths[number] == depth and (number in inner) == is_inner
                ]
                groups = by_length(sorted(chosen, reverse=True), 0.0 if is_inner else padding)
                numbers += [tuple(number for _, number in group) for group in groups]
        # A single token after a state would be decoded, which changes the state in place.
        least = [2 if trees.depths[group[0]] and group[0] not in inner else 1 for group in numbers]
        documents = Documents.of_groups(torch.tensor(trees.bounds, dtype=torch.int32), numbers, least)
        return cls(documents.to(device), tuple(numbers), trees.parents)


def places(documents: Documents, chunk: int) -> int:
    """Returns the places that a scan computes if it computes whole chunks of this many tokens."""
    shapes = (group.real_DL.shape for group in documents.groups)
    return sum(rows * -(-length // chunk) * chunk for rows, length in shapes)


def cache_argument(names: Sequence[str]) -> str | None:
    """Returns the name of the argument that takes a cache; None if there is none."""
    return next((name for name in names if name in CACHES), None)


def run_steps(
    steps: Steps, cache: str, arguments: Mapping[str, Any], deal: Callable[[str, Any, Group], Any], forward: Any
) -> list[Any]:
    """Returns what a module computes for each group of documents.

    Args:
        steps: The documents.
        cache: The name of the argument that takes a cache.
        arguments: Those of the packed row, by name.
        deal: Returns an argument for the rows of a group.
        forward: Computes rows.
    """
    kept: dict[int, _States] = {}
    results = []
    for group, numbers in zip(steps.documents.groups, steps.numbers, strict=True):
        above = [kept[steps.parents[number]] for number in numbers if steps.parents[number] >= 0]
        states = States({key: torch.stack([each[key] for each in above]) for key in (above[0] if above else ())})
        named = {name: deal(name, value, group) for name, value in arguments.items()}
        results.append(forward(**{**named, cache: states}))
        for row, number in enumerate(numbers):
            kept[number] = {key: state[row] for key, state in states.kept.items()}
    return results


class States:
    """The part of transformers' ``Cache`` that recurrent modules call: gives the states before, and keeps new ones.

    transformers copies states into fixed memory, which cuts the gradient of what was there before.

    Attributes:
        kept: The states after the tokens, with a row for each document.
    """

    def __init__(self, given: _States) -> None:
        self._given = given
        self.kept: _States = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Returns the last inputs of a convolution; None at the start of a text."""
        return self._given.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Returns the state of a recurrence; None at the start of a text."""
        return self._given.get(("recurrent", state_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Returns whether there are tokens before."""
        return bool(self._given)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Returns whether states of all tokens are wanted."""
        return False

    def update_conv_state(
        self, states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Keeps the last inputs; returns all of them, with those before."""
        before = self._given.get(("conv", state_idx))
        inputs = states if before is None else torch.cat((before, states), -1)
        size = conv_kernel_size or states.shape[-1]
        padded = nn.functional.pad(inputs, (max(0, size - inputs.shape[-1]), 0))
        self.kept["conv", state_idx] = padded[..., -size:]
        return inputs if inputs.shape[-1] >= size else padded

    def update_recurrent_state(self, states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keeps the state; returns it."""
        self.kept["recurrent", state_idx] = states
        return states
