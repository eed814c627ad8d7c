"""Sinks: receivers of a run's events. A sink is any callable that takes an event; none of these loads torch."""

from __future__ import annotations

from ingle.events import Event, Sink
from ingle.sinks.jsonl import EventsFile, MetricsFile
from ingle.sinks.terminal import Terminal
from ingle.sinks.trackers import TensorBoard, Wandb

__all__ = ["EventsFile", "MetricsFile", "TensorBoard", "Terminal", "Wandb", "combine"]


def combine(*sinks: Sink) -> Sink:
    """Returns a sink that passes each event to all ``sinks``, in order."""

    def receive(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return receive
