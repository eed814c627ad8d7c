"""Sinks: where a run's events go.  A sink is any callable that takes an event; none of these loads torch."""

from ingle.sinks.combination import combine
from ingle.sinks.metrics import MetricsFile
from ingle.sinks.tensorboard import TensorBoard
from ingle.sinks.terminal import Terminal
from ingle.sinks.wandb import Wandb

__all__ = ["MetricsFile", "TensorBoard", "Terminal", "Wandb", "combine"]
