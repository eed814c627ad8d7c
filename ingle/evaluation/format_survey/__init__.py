"""Compares formats on a model and a text: size, loss, speed and memory of each, and a recommendation."""

from ingle.evaluation.format_survey.candidates import (
    BITSANDBYTES,
    HQQ,
    Target,
    find_target,
    safetensors_base,
    target_names,
)
from ingle.evaluation.format_survey.survey import SurveyRequest, survey
from ingle.evaluation.format_survey.text_windows import read_windows
from ingle.report.format_advice import LIMIT, NUM_TOKENS

__all__ = [
    "BITSANDBYTES",
    "HQQ",
    "LIMIT",
    "NUM_TOKENS",
    "SurveyRequest",
    "Target",
    "find_target",
    "read_windows",
    "safetensors_base",
    "survey",
    "target_names",
]
