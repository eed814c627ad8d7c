"""What the loss rewards: one file per family of objectives."""

from ingle.objectives.base import Objective
from ingle.objectives.lm import LanguageModelling
from ingle.objectives.watched import Watched

__all__ = ["LanguageModelling", "Objective", "Watched"]
