"""A fixed sample of ``make fuzz``: mutated files are read correctly or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_mutated_files_are_read_correctly_or_refused(tmp_path: Path) -> None:
    words = ["--cases", "4", "--failures", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words], cwd=_ROOT, capture_output=True, text=True, timeout=900
    )
    kept = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *kept])[:20_000]
