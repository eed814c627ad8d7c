"""Results as version 0.1.0 wrote them: a ``report.json``, and a comparison and a summary of ``ingle evaluate --json``.

The comparison is that of ``make_pair(1, 4, 1, 1)`` in ``tests/unit/evaluation/test_comparison.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ingle.report.results import Comparison, RunReport, Summary, from_dict

STORED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

REPORT = from_dict(RunReport, STORED["report"])
COMPARISON = from_dict(Comparison, STORED["comparison"])
SUMMARY = from_dict(Summary, STORED["summary"])
