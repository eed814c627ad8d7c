"""Which format for this model and this text: size, loss, speed and memory of all of them, and a recommendation."""

from ingle.evaluation.formats.candidates import HQQ, PACKED, Target, find_target, safetensors_base, target_names
from ingle.evaluation.formats.choice import LIMIT
from ingle.evaluation.formats.survey import NUM_TOKENS, Survey, survey
from ingle.evaluation.formats.text import read_windows

__all__ = [
    "HQQ",
    "LIMIT",
    "NUM_TOKENS",
    "PACKED",
    "Survey",
    "Target",
    "find_target",
    "read_windows",
    "safetensors_base",
    "survey",
    "target_names",
]
