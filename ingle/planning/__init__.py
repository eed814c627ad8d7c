"""What a run needs, told before it is spent."""

from ingle.planning.plan import Plan, make_plan
from ingle.planning.shape import DataShape, LinearShape, ModelShape

__all__ = ["DataShape", "LinearShape", "ModelShape", "Plan", "make_plan"]
