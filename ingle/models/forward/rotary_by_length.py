"""Rotary positions whose factors depend on the text length, computed for each packed document by its own length.

``longrope`` (Phi-3) uses other factors for all tokens of a text that is longer than
``original_max_position_embeddings``; ``dynamic`` changes them with every token beyond ``max_position_embeddings``.
transformers chooses the factors by the largest position in a call, and ``dynamic`` keeps them for the next call. With
several documents in a call, the choice must be made for each document, with a copy of transformers' module.

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
    """Runs transformers' rotary module ``base`` separately for each document.

    Args:
        base: A rotary module with at least one type of positions that depends on the length.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Returns the attributes of ``base``, which the architecture may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns what ``base`` returns for each document alone.

        Args:
            x: Determines dtype and device of the result.
            position_ids: [B, T]; a document begins at position 0 and at the start of a row.
            args: Further arguments of ``base``: the layer type, if each type has its own positions.
            kwargs: Further arguments of ``base`` by name.

        Returns:
            As ``base``: cos and sin, [B, T, D] each, or one complex tensor.
        """
        kind, limit = _length_rule(self.base, kwargs.get("layer_type", args[0] if args else None))
        if kind is None or position_ids.dim() != 2:
            return self.base(x, position_ids, *args, **kwargs)
        # Lengths with the same factors are treated as one length.
        longest = document_lengths(position_ids).clamp_min(limit)
        if kind == _LONGROPE:
            longest = longest.clamp_max(limit + 1)
        config = getattr(self.base, "config", None)
        results: Any = None
        for length in longest.unique().tolist():
            chosen_BT = longest == length
            # A new copy each time, because it keeps state; the copies share the config.
            alone = copy.deepcopy(self.base, {id(config): config})
            result = alone(x, position_ids[chosen_BT][None], *args, **kwargs)
            parts = result if isinstance(result, tuple) else (result,)
            if results is None:
                results = tuple(part.new_empty(*position_ids.shape, part.shape[-1]) for part in parts)
            for full, part in zip(results, parts, strict=True):
                full[chosen_BT] = part[0]
        return results if len(results) > 1 else results[0]


def document_lengths(position_ids: Tensor) -> Tensor:
    """Returns for each token the length of its document: one more than its largest position.

    In a step of generation a row holds one token, and its position gives the length of the text so far.

    Args:
        position_ids: [B, T].

    Returns:
        [B, T].
    """
    # Documents begin at 0, or behind the keys of an adapter; they are numbered from 0.
    begins_BT = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    document_BT = begins_BT.cumsum(1)
    largest = torch.zeros_like(position_ids).scatter_reduce_(1, document_BT, position_ids, "amax")
    return largest.gather(1, document_BT) + 1


def rotate_by_document(model: nn.Module) -> None:
    """Wraps every rotary module of a model whose factors depend on the length in a :class:`DocumentRotary`."""
    for name, module in list(model.named_modules()):
        if any(_depends_on_length(kind) for kind in _kinds(module).values()):
            model.set_submodule(name, DocumentRotary(module))


def key_change_lengths(model: nn.Module) -> frozenset[int]:
    """Returns the lengths beyond which all cached keys change, so that a cache must be recomputed."""
    found = set[int]()
    for module in model.modules():
        if isinstance(module, DocumentRotary):
            rules = [_length_rule(module.base, layer_type) for layer_type in _kinds(module.base)]
            found |= {limit for kind, limit in rules if kind == _LONGROPE}
    return frozenset(found)


def unchanged_length(model: nn.Module) -> float:
    """Returns the longest text for which the factors are those of short texts; infinity if none changes them."""
    bases = [module.base for module in model.modules() if isinstance(module, DocumentRotary)]
    rules = [_length_rule(base, layer_type) for base in bases for layer_type in _kinds(base)]
    return min((limit for kind, limit in rules if kind is not None), default=float("inf"))


def rope_types(config: Any) -> frozenset[str]:
    """Returns the types of rotary positions that a config names."""
    return frozenset(str(each.get("rope_type", each.get("type", "default"))) for each in rope_sections(config))


def rope_sections(config: Any) -> Iterator[dict[str, Any]]:
    """Yields the rotary settings of a config: one, or one for each layer type."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, dict):
        return
    nested = [each for each in settings.values() if isinstance(each, dict)]
    yield from nested or [settings]


def _depends_on_length(kind: str) -> bool:
    """Returns whether transformers' ``dynamic_rope_update`` changes factors of this type."""
    return "dynamic" in kind or kind == _LONGROPE


def _kinds(module: nn.Module) -> Mapping[str | None, str]:
    """Returns the rope types of a rotary module by layer type; none for any other module."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return {layer_type: kind for layer_type, kind in kinds.items() if isinstance(kind, str)}
    return {None: kinds} if isinstance(kinds, str) else {}


def _length_rule(module: nn.Module, layer_type: str | None) -> tuple[str | None, int]:
    """Returns the rope type if it depends on the length, and the longest text with unchanged factors."""
    kind = _kinds(module).get(layer_type)
    if kind is None or not _depends_on_length(kind):
        return None, 0
    rotary: Any = module
    if kind == _LONGROPE:
        settings = rotary.config.rope_parameters
        return kind, int((settings if layer_type is None else settings[layer_type])["original_max_position_embeddings"])
    return kind, int(rotary.original_max_seq_len)
