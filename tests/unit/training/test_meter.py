"""What a run says of its memory."""

from __future__ import annotations

import subprocess
import sys

#: In a process of its own: others hold memory that they have given back, and take it again.
_MEASURE = """
import mmap
import torch
from ingle.training.meter import peak_memory_bytes, resident_bytes

before = resident_bytes()
with mmap.mmap(-1, 256 << 20) as held:
    held.write(b"x" * len(held))
    during = resident_bytes()
print(before, during, resident_bytes(), peak_memory_bytes(torch.device("cpu")))
"""


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    output = subprocess.check_output([sys.executable, "-c", _MEASURE], text=True)
    before, during, after, peak = map(int, output.split())
    assert after < before + (64 << 20) < during
    assert peak > during - (16 << 20)  # the kernel counts pages in batches
