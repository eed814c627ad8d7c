"""What a run says of its memory."""

from __future__ import annotations

import numpy as np
import torch

from ingle.training.meter import peak_memory_bytes, resident_bytes

SIZE = 256 << 20


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    before = resident_bytes()
    held = np.ones(SIZE, np.uint8)
    assert resident_bytes() >= before + 0.9 * SIZE
    del held
    after = resident_bytes()
    assert after < before + 0.5 * SIZE
    assert peak_memory_bytes(torch.device("cpu")) >= after + 0.9 * SIZE
