"""What the layout of an architecture costs, from the table of model types."""

from __future__ import annotations

from ingle.config.objective import TRAINS
from ingle.config.run import Run
from ingle.planning.model_types import ModelType, model_table

#: Padded places per token that a group of documents may have. Measured on five architectures: 0.1 to 0.25 is fastest.
PADDING = 0.25


def layout_note(run: Run, model_type: str) -> str | None:
    """Returns a sentence on what a layout computes in vain; None if nothing is padded, or for an unknown type."""
    found = [each for each in model_table().find(model_type) if each.kind in TRAINS[run.objective.kind]]
    return _sentence(found[0]) if found else None


def _sentence(entry: ModelType) -> str | None:
    match entry.layout:
        case "documents":
            return (
                f"Documents are packed, but {' and '.join(entry.dealt)} of {entry.name} see them as the rows of "
                f"batches, grouped by length, with at most {PADDING:.0%} more places than tokens."
            )
        case "rows":
            return (
                f"{entry.name} cannot be packed: each document is a row of its own, grouped by length, with at most "
                f"{PADDING:.0%} more places than tokens; more when it is sharded."
            )
        case "equal_rows":
            return (
                f"{entry.name} can be neither packed nor padded: documents of equal length are computed together, so a "
                "batch takes a call for each length."
            )
    return None
