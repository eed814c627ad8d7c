"""``parallel:`` which devices take part."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import Section


class ParallelConfig(Section):
    """Which devices take part.

    Attributes:
        kind: ``auto`` and ``none`` use one device.
        device: ``auto`` takes the GPU when there is one.
        num_threads: CPU threads for arithmetic; all cores given to the process when null.
    """

    kind: Literal["auto", "none"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=1, le=1_024)] | None = None
