"""What a run needs, predicted before anything is spent."""

from ingle.planning.plan import Plan, make_plan
from ingle.planning.remedies import find_better_batch
from ingle.planning.shape import DataShape, LinearShape, ModelShape

__all__ = ["DataShape", "LinearShape", "ModelShape", "Plan", "find_better_batch", "make_plan"]
