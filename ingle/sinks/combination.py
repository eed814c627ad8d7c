"""Several sinks as one."""

from __future__ import annotations

from ingle.events import Event, Sink


def combine(*sinks: Sink) -> Sink:
    """A sink that tells each of ``sinks``, in order."""

    def tell(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return tell
