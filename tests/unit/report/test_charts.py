"""Charts."""

from __future__ import annotations

import pytest

from ingle.report.charts import nice_ticks, smooth, tick_label


def test_ticks_are_round_and_inside():
    assert nice_ticks(0.0, 4.2, 5) == [0, 1, 2, 3, 4]
    assert nice_ticks(-0.013, 0.027, 4) == pytest.approx([-0.01, 0.0, 0.01, 0.02])
    for low, high in ((0.0, 1e-9), (3.1, 3.2), (-1e6, 1e6)):
        ticks = nice_ticks(low, high, 5)
        assert 3 <= len(ticks) <= 12 and all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_tick_labels():
    assert [tick_label(value, 0.25) for value in (0, 0.25, -0.5)] == ["0", "0.25", "−0.50"]
    assert tick_label(2000, 1000) == "2,000"


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    import numpy as np

    assert smooth(np.array([3.0, 3.0, 3.0]), 5).tolist() == pytest.approx([3.0, 3.0, 3.0])
    assert smooth(np.array([4.0, 0.0]), 3).tolist() == pytest.approx([4.0, 4.0 / 3])
