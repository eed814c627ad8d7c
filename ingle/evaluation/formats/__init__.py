"""Which format for this model and this text: size, loss, speed and memory of all of them, and a recommendation."""

from ingle.evaluation.formats.bench import Bench
from ingle.evaluation.formats.candidates import Candidate, Target, find_target, list_candidates, target_names
from ingle.evaluation.formats.choice import LIMIT
from ingle.evaluation.formats.comparison import Notebook, Subject, compare_formats
from ingle.evaluation.formats.page import render_page
from ingle.evaluation.formats.text import read_windows

__all__ = [
    "LIMIT",
    "Bench",
    "Candidate",
    "Notebook",
    "Subject",
    "Target",
    "compare_formats",
    "find_target",
    "list_candidates",
    "read_windows",
    "render_page",
    "target_names",
]
