"""The architectures of transformers: how Ingle trains each, or why not. Read from a table, without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

TABLE = Path(__file__).with_name("model_types.json")

LayoutKind = Literal["packed", "documents", "rows", "equal_rows"]


@dataclass(frozen=True, slots=True)
class ModelType:
    """One kind of models of a ``model_type``.

    Attributes:
        name: The ``model_type`` in ``config.json``.
        kind: ``causal``, ``encoder`` or ``encoder_decoder``.
        layout: How packed documents go through it, as in :mod:`ingle.models.forward.layout`; None if it is not trained,
            or if no small model of it could be tried.
        dealt: Classes of the modules that see documents as rows.
        quantizes: Whether its linear layers can be quantized.
        has_experts: Whether it has experts, which are then quantized too.
        objectives: Values of ``objective.kind``.
        exports: Values of ``ingle export --to`` for the whole model.
        reason: Why it is not trained, not quantized, or not tried.
    """

    name: str
    kind: Literal["causal", "encoder", "encoder_decoder"]
    layout: LayoutKind | None = None
    dealt: tuple[str, ...] = ()
    quantizes: bool = True
    has_experts: bool = False
    objectives: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether Ingle trains it."""
        return bool(self.objectives)

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModelTable:
    """All architectures of a version of transformers.

    Attributes:
        transformers: The version.
        types: By name, those of one name by kind.
    """

    transformers: str
    types: tuple[ModelType, ...]

    def find(self, name: str, kind: str | None = None) -> list[ModelType]:
        """Returns the entries of a ``model_type``, of one kind or of all."""
        return [each for each in self.types if each.name == name and kind in (None, each.kind)]


@cache
def model_table() -> ModelTable:
    """Returns the table of the release."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    return ModelTable(stored["transformers"], tuple(map(_entry, stored["types"])))


def write_table(transformers: str, types: Iterable[ModelType]) -> None:
    """Replaces the table of the release; values that an entry shares with most others are left out."""
    lines = (json.dumps(_compact(each)) for each in sorted(types, key=lambda each: (each.name, each.kind)))
    text = ",\n".join(lines)
    TABLE.write_text(f'{{"transformers": "{transformers}", "types": [\n{text}\n]}}\n', encoding="utf-8")


def _compact(entry: ModelType) -> dict[str, Any]:
    default = ModelType(entry.name, entry.kind).to_dict()
    stored = entry.to_dict()
    return {key: value for key, value in stored.items() if key in ("name", "kind") or value != default[key]}


def _entry(stored: dict[str, Any]) -> ModelType:
    return ModelType(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})
