"""One number of threads for torch and numba.

On Linux both run on libgomp, and numba's start sets *its* number of threads for everyone in the process: left alone,
the first numba kernel makes a torch that was told to use one thread use all processors.
"""

from __future__ import annotations

import numba
import torch

#: Numbers to work on from which it pays to wake the other threads.
PARALLEL_FROM = 1 << 17


def set_threads(count: int) -> None:
    """Sets torch's threads, which every kernel follows: it asks torch at each call."""
    torch.set_num_threads(count)


def match_threads(work: int) -> int:
    """Gives numba all of torch's threads, or one, for the next kernel; torch keeps its own number.

    Nothing in between: libgomp ends threads that a smaller team leaves idle, and would start them anew every time.

    Args:
        work: Numbers the kernel works on.

    Returns:
        How many threads it gets.
    """
    wanted = torch.get_num_threads()
    count = min(wanted, numba.config.NUMBA_NUM_THREADS) if work >= PARALLEL_FROM else 1
    numba.set_num_threads(count)
    if torch.get_num_threads() != wanted:  # numba has just started its layer
        torch.set_num_threads(wanted)
    return int(count)
