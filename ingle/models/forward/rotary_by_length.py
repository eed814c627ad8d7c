"""Rotary positions whose factors depend on the length of a text: every document gets those of its own length.

``longrope`` (Phi-3) takes other factors for every token of a text that is longer than
``original_max_position_embeddings``; ``dynamic`` stretches them with every token beyond ``max_position_embeddings``.
transformers chooses by the largest position of the whole call and ``dynamic`` keeps what it chose for the next one.
Here many documents share a call, so the choice is made for each of them, with a fresh copy of transformers' own module.

Legend: B rows, T tokens of a row, D rotated size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LONGROPE = "longrope"


class DocumentRotary(nn.Module):
    """Answers for transformers' rotary module ``base``, document by document.

    Args:
        base: A rotary module with at least one type of positions that depends on the length.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """What the architecture asks of its rotary module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``base`` gives for each document alone.

        Args:
            x: Says which dtype and device the result has.
            position_ids: [B, T]; a document begins at position 0 and at the start of a row.
            args: What else ``base`` takes: the type of the layers, where each type has positions of its own.
            kwargs: The same by name.

        Returns:
            As ``base``: cos and sin, [B, T, D] each, or one complex tensor.
        """
        kind, limit = _switch(self.base, kwargs.get("layer_type", args[0] if args else None))
        if kind is None or position_ids.dim() != 2:
            return self.base(x, position_ids, *args, **kwargs)
        lengths_BT = document_lengths(position_ids)
        longest = lengths_BT.clamp_min(limit)  # alike for all that are not stretched
        if kind == _LONGROPE:
            longest = longest.clamp_max(limit + 1)  # and for all that are
        results: Any = None
        for length in longest.unique().tolist():
            chosen_BT = longest == length
            result = self._alone(x, position_ids[chosen_BT][None], *args, **kwargs)
            parts = result if isinstance(result, tuple) else (result,)
            if results is None:
                results = tuple(part.new_empty(*position_ids.shape, part.shape[-1]) for part in parts)
            for whole, part in zip(results, parts, strict=True):
                whole[chosen_BT] = part[0]
        return results if len(results) > 1 else results[0]

    def _alone(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Asks a fresh copy, so that nothing is left for the next document; the copy shares the config."""
        config = getattr(self.base, "config", None)
        return copy.deepcopy(self.base, {id(config): config})(x, position_ids, *args, **kwargs)


def document_lengths(position_ids: Tensor) -> Tensor:
    """For each token the length of its document: one more than the largest position in it.

    In a step of generation a row holds one token, and its position says how long the text is by now.

    Args:
        position_ids: [B, T].

    Returns:
        [B, T].
    """
    begins_BT = position_ids == 0
    begins_BT[:, 0] = False  # numbers start at 0, whatever the first position is
    document_BT = begins_BT.cumsum(1)
    largest = torch.zeros_like(position_ids).scatter_reduce_(1, document_BT, position_ids, "amax")
    return largest.gather(1, document_BT) + 1


def rotate_by_document(model: nn.Module) -> None:
    """Puts a :class:`DocumentRotary` around every rotary module of a model whose factors depend on the length."""
    for name, module in list(model.named_modules()):
        if any(_depends_on_length(kind) for kind in _kinds(module).values()):
            model.set_submodule(name, DocumentRotary(module))


def recomputed_beyond(model: nn.Module) -> frozenset[int]:
    """Lengths beyond which the keys of every earlier token are other ones, so that a cache must be made anew."""
    found = set[int]()
    for module in model.modules():
        if isinstance(module, DocumentRotary):
            for layer_type in _kinds(module.base):
                kind, limit = _switch(module.base, layer_type)
                if kind == _LONGROPE:
                    found.add(limit)
    return frozenset(found)


def rope_types(config: Any) -> frozenset[str]:
    """The types of rotary positions that a config names."""
    return frozenset(str(each.get("rope_type", each.get("type", "default"))) for each in rope_sections(config))


def rope_sections(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings of a config: one, or one for each type of layers."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, dict):
        return
    nested = [each for each in settings.values() if isinstance(each, dict)]
    yield from nested or [settings]


def _depends_on_length(kind: str) -> bool:
    """The rule of transformers' ``dynamic_rope_update``."""
    return "dynamic" in kind or kind == _LONGROPE


def _kinds(module: nn.Module) -> Mapping[str | None, str]:
    """The types of a rotary module by type of layer; none for any other module."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return {layer_type: kind for layer_type, kind in kinds.items() if isinstance(kind, str)}
    return {None: kinds} if isinstance(kinds, str) else {}


def _switch(module: nn.Module, layer_type: str | None) -> tuple[str | None, int]:
    """The type of positions where it depends on the length, and the longest text that is not stretched."""
    kind = _kinds(module).get(layer_type)
    if kind is None or not _depends_on_length(kind):
        return None, 0
    rotary: Any = module
    if kind == _LONGROPE:
        settings = rotary.config.rope_parameters
        return kind, int((settings if layer_type is None else settings[layer_type])["original_max_position_embeddings"])
    return kind, int(rotary.original_max_seq_len)
