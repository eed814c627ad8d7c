"""``parallel:`` devices and threads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import Section


class ParallelConfig(Section):
    """Devices and threads.

    Attributes:
        kind: ``auto`` and ``none`` use one device.
        device: ``auto`` is the GPU if there is one, and the CPU otherwise.
        num_threads: CPU threads for computation. If null, one per core available to the process.
    """

    kind: Literal["auto", "none"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=1, le=1_024)] | None = None
