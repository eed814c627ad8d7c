"""What the loss rewards: one file per family of objectives."""

from ingle.objectives.base import Objective
from ingle.objectives.lm import LanguageModelling

__all__ = ["LanguageModelling", "Objective"]
