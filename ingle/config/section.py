"""The base of every section: frozen, strict, no unknown keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

#: A tuple that also takes YAML's lists; its elements stay strict.
Strings = Annotated[tuple[str, ...], Strict(False)]

#: A text that says something.
Text = Annotated[str, Field(min_length=1)]

# Every number has an upper bound, so that a slip of the keyboard (or an attack) is refused when the config is read and
# not after hours of allocating.  The bounds are far above anything a machine of today can do.

#: Of random numbers; what a signed 64-bit integer holds.
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]

#: Steps, samples, sequences in a run.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]

#: Sequences or answers that are computed together.
BatchSize = Annotated[int, Field(ge=1, le=1_048_576)]

#: A number above 0 that stays finite in float32.
Positive = Annotated[float, Field(gt=0, le=1e9)]


class Section(BaseModel):
    """A frozen, strict part of the config tree; an unknown key is an error, and so are NaN and infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=False
    )


def tagged(tag: str, default: str | None = None, *, input_type: Any = None) -> BeforeValidator:
    """Lets a bare word stand for a tagged section (``adapter: none``) and fills in a missing tag.

    Args:
        tag: The key that tells the members apart (``kind``).
        default: The member that a section without the key means; None when it has to be said.
        input_type: What the JSON Schema shows as accepted.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return {tag: value}
        if default is not None and isinstance(value, Mapping) and tag not in value:
            return {tag: default, **value}
        return value

    return BeforeValidator(fill, json_schema_input_type=input_type)


def one_or_more(key: str) -> Callable[[Any], Any]:
    """A validator that takes one item for a list of one, and a bare string for an item with only ``key``."""

    def fill(value: Any) -> Any:
        items = [value] if isinstance(value, str | Mapping | Section) else value
        if not isinstance(items, list | tuple):
            return value
        return [{key: item} if isinstance(item, str) else item for item in items]

    return fill
