"""Describes the types of models for tables in the terminal and the documentation."""

from __future__ import annotations

from ingle.planning.model_types import ModelType

COLUMNS = ("model type", "kind", "layout", "base formats", "objectives", "export", "remarks")


def cells(entry: ModelType) -> tuple[str, ...]:
    """Returns a row of the table, in the order of :data:`COLUMNS`."""
    kind = entry.kind.replace("_", "-")
    if not entry.is_trained:
        return entry.name, kind, "not trained", "", "", "", entry.reason or ""
    formats = "none" if not entry.quantizes else "all, also of experts" if entry.has_experts else "all"
    remarks = [f"over documents: {', '.join(entry.dealt)}"] if entry.dealt else []
    remarks += [entry.reason] if entry.reason else []
    layout = "found when loaded" if entry.layout is None else entry.layout.replace("_", " ")
    return (
        entry.name, kind, layout, formats, ", ".join(entry.objectives), ", ".join(entry.exports), "; ".join(remarks)
    )  # fmt: skip
