"""Times several functions in turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the seconds of each function in each round, without the warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + warm_up):
        for name, function in functions.items():
            start = clock()
            function()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def millions_per_s(seconds: Mapping[str, list[float]], work: int) -> dict[str, float]:
    """Returns the median rates in millions of units of work per second."""
    return {name: work / statistics.median(values) / 1e6 for name, values in seconds.items()}
