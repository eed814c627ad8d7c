"""Limits the time and memory of code that comes with a model, such as a chat template."""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

#: Seconds of CPU time between two checks of the clock.
_TICK_S = 0.25


class OutOfTime(BaseException):
    """The time is up. Not an ``Exception``, so that no handler inside the limited code catches it."""


class Quota:
    """Limits of time and memory for blocks of code.

    Entering the context manager installs the timer once; :meth:`limited` then sets the limits for one block, which is
    fast. Time is the CPU time of the thread, so other programs do not count. Python delivers signals only to the main
    thread; in other threads only memory is limited.

    Ctrl-C and SIGTERM end a block that has run for a while, even if their handlers only set a flag.

    Args:
        num_bytes: Memory that a block may allocate in addition to the memory of the process on entering the quota.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._start, self._deadline = math.inf, math.inf
        self._address_space, self._former = (0, 0), (0, 0)
        self._stack = ExitStack()

    def __enter__(self) -> Quota:
        self._former = resource.getrlimit(resource.RLIMIT_AS)
        self._address_space = _bounded(self._former, self._num_bytes)
        if threading.current_thread() is threading.main_thread():
            self._stack.enter_context(self._timer())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Stops the block if it exceeds a limit.

        Args:
            seconds: Limit of CPU time.

        Raises:
            OutOfTime: The block exceeded the time limit.
            MemoryError: The block exceeded the memory limit.
            KeyboardInterrupt: The user asked to stop.
        """
        resource.setrlimit(resource.RLIMIT_AS, self._address_space)
        try:
            self._start = time.thread_time()
            self._deadline = self._start + seconds
            yield
        finally:
            try:
                self._start = self._deadline = math.inf
            finally:  # the last tick may come at this very moment
                resource.setrlimit(resource.RLIMIT_AS, self._former)

    @contextmanager
    def _timer(self) -> Iterator[None]:
        former: dict[int, Callable[[int, FrameType | None], Any]] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            former[number](number, frame)
            raise KeyboardInterrupt

        def tick(number: int, frame: FrameType | None) -> None:
            now = time.thread_time()
            if now >= self._deadline:
                raise OutOfTime
            if now < self._start + _TICK_S:
                return
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if number not in former and callable(handler):
                    former[number] = handler
                    signal.signal(number, stop)

        previous = signal.signal(signal.SIGPROF, tick)
        signal.setitimer(signal.ITIMER_PROF, _TICK_S, _TICK_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            # A tick may still be pending, and the default action for it ends the program.
            signal.signal(signal.SIGPROF, signal.SIG_IGN if previous == signal.SIG_DFL else previous)
            for number, handler in former.items():
                signal.signal(number, handler)


def _bounded(former: tuple[int, int], num_bytes: int) -> tuple[int, int]:
    """Returns the soft and hard limit of the address space: the present size of the process plus ``num_bytes``."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # not Linux: the size of the process is unknown
        return former
    try:
        pages = int(os.read(file, 64).split()[0])
    finally:
        os.close(file)
    if pages == 0:  # some container runtimes hide the size
        return former
    wanted = pages * resource.getpagesize() + num_bytes
    soft, hard = former
    return min(x for x in (wanted, soft, hard) if x != resource.RLIM_INFINITY), hard
