"""Limits of time and memory for a program that comes with a file, such as a chat template."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Seconds of processor time between two looks at the clock.
_TICK_S = 0.25


class OutOfTime(BaseException):
    """The time is over.  Not an ``Exception``, so that nothing inside the limited code catches it."""


@contextmanager
def limited(seconds: float, num_bytes: int) -> Iterator[None]:
    """Stops the block when it takes too much.

    Time is the thread's processor time, so a busy machine does not count.  Python delivers signals to the main thread
    only; in other threads only memory is limited.

    Ctrl-C and SIGTERM end a block that has run for a while, even where their handler only takes a note of them.

    Args:
        seconds: Most processor time.
        num_bytes: Most memory beyond what the process has now.

    Raises:
        OutOfTime: The block took longer.
        MemoryError: The block asked for more memory.
        KeyboardInterrupt: The user asked to stop.
    """
    former = _limit_memory(num_bytes)
    try:
        if threading.current_thread() is threading.main_thread():
            with _limited_time(seconds):
                yield
        else:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def _limit_memory(num_bytes: int) -> tuple[int, int]:
    """Lowers the limit of this process's addresses; returns the former one."""
    former = resource.getrlimit(resource.RLIMIT_AS)
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # not Linux: nothing tells what the process has
        return former
    try:
        pages = int(os.read(file, 64).split()[0])
    finally:
        os.close(file)
    if pages == 0:  # a sandbox that does not tell
        return former
    wanted = pages * resource.getpagesize() + num_bytes
    soft, hard = former
    resource.setrlimit(resource.RLIMIT_AS, (min(x for x in (wanted, soft, hard) if x != resource.RLIM_INFINITY), hard))
    return former


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    began = time.thread_time()
    former: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        former[number](number, frame)
        raise KeyboardInterrupt

    def tick(number: int, frame: FrameType | None) -> None:
        if time.thread_time() - began >= seconds:
            raise OutOfTime
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if number not in former and callable(handler):
                former[number] = handler
                signal.signal(number, stop)

    ticked = signal.signal(signal.SIGPROF, tick)
    signal.setitimer(signal.ITIMER_PROF, _TICK_S, _TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        # A tick may be on its way still, and the default for it is to end the program.
        signal.signal(signal.SIGPROF, signal.SIG_IGN if ticked == signal.SIG_DFL else ticked)
        for number, handler in former.items():
            signal.signal(number, handler)
