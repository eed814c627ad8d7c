"""What the layout of an architecture costs, from the table of model types."""

from __future__ import annotations

from collections.abc import Collection

from ingle.config.objective import TRAINS
from ingle.config.run import Run
from ingle.planning.model_types import LayoutKind, model_table

#: Padded places per token that a group of documents may have. Measured on five architectures: 0.1 to 0.25 is fastest.
PADDING = 0.25


def layout_note(run: Run, model_type: str) -> str | None:
    """Returns a sentence on what a layout computes in vain; None if nothing is padded, or for an unknown type."""
    found = [each for each in model_table().find(model_type) if each.kind in TRAINS[run.objective.kind]]
    return describe_layout(model_type, found[0].layout, found[0].dealt) if found else None


def describe_layout(
    name: str, kind: LayoutKind | None, dealt: Collection[str] = (), *, because: str = "", tried: bool = True
) -> str | None:
    """Returns a sentence on what a layout computes in vain; None if nothing is padded.

    Args:
        name: The ``model_type``.
        kind: The layout; None if it is not known.
        dealt: Classes of the modules that see documents as rows.
        because: Why no faster layout is used, or none could be tried.
        tried: Whether a small copy of the model was exact with it.
    """
    why = f" ({because})" if because else ""
    if not tried:
        return f"No small copy of {name} could be computed{why}, so faster ways to pack documents were not tried."
    slow = [each for each in dealt if "Embedding" not in each]  # looking up positions costs nothing
    match kind:
        case "documents" if slow:
            one, see = (" and ".join(slow), "see" if len(slow) > 1 else "sees")
            return (
                f"Documents are packed, but {one} of {name} {see} them as the rows of batches, grouped by length, with "
                f"at most {PADDING:.0%} more places than tokens."
            )
        case "rows":
            return (
                f"{name} cannot be packed{why}: each document is a row of its own, grouped by length, with at most "
                f"{PADDING:.0%} more places than tokens; more when it is sharded."
            )
        case "equal_rows":
            return (
                f"{name} can be neither packed nor padded{why}: documents of equal length are computed together, so a "
                "batch takes a call for each length."
            )
    return None
