"""Which format for this model and this text: size, loss, speed and memory of all of them, and a recommendation."""

from ingle.evaluation.formats.candidates import Target, find_target, target_names
from ingle.evaluation.formats.choice import LIMIT
from ingle.evaluation.formats.survey import NUM_TOKENS, Survey, survey
from ingle.evaluation.formats.text import read_windows

__all__ = [
    "LIMIT",
    "NUM_TOKENS",
    "Survey",
    "Target",
    "find_target",
    "read_windows",
    "survey",
    "target_names",
]
