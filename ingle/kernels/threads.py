"""Keeps the number of threads of torch and numba equal.

On Linux both use libgomp, and when numba starts it sets the number of threads of the process: without this module, the
first numba kernel would make torch use all processors, even if torch was set to one thread.
"""

from __future__ import annotations

import numba
import torch

#: Smallest number of elements for which waking the other threads pays off.
PARALLEL_FROM = 1 << 17


def set_threads(count: int) -> None:
    """Sets the number of threads of torch; each kernel uses as many."""
    torch.set_num_threads(count)


def match_threads(work: int) -> int:
    """Sets numba's threads for the next kernel: all of torch's threads, or one; torch keeps its own number.

    It never selects a number in between, because libgomp ends threads that a smaller team does not use, and would start
    new ones each time.

    Args:
        work: Number of elements that the kernel processes.

    Returns:
        The number of threads.
    """
    wanted = torch.get_num_threads()
    count = min(wanted, numba.config.NUMBA_NUM_THREADS) if work >= PARALLEL_FROM else 1
    numba.set_num_threads(count)
    if torch.get_num_threads() != wanted:  # numba has just started its layer
        torch.set_num_threads(wanted)
    return int(count)
