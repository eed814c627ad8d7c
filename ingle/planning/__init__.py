"""Predicts the steps, the memory, the time and the price of a run before it starts, and chooses its strategy."""

from ingle.planning.companions import find_companions
from ingle.planning.devices import Device, DeviceTable
from ingle.planning.memory import MemoryParts
from ingle.planning.plan import Plan, make_plan
from ingle.planning.remedies import find_better_batch
from ingle.planning.rollouts import sampled_shape
from ingle.planning.search import Problem
from ingle.planning.shape import DataShape, LayerShape, LinearShape, ModelShape
from ingle.planning.strategy import Strategy

__all__ = [
    "DataShape",
    "Device",
    "DeviceTable",
    "LayerShape",
    "LinearShape",
    "MemoryParts",
    "ModelShape",
    "Plan",
    "Problem",
    "Strategy",
    "find_better_batch",
    "find_companions",
    "make_plan",
    "sampled_shape",
]
