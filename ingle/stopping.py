"""Handles Ctrl-C and SIGTERM: every command ends within ten seconds and leaves no incomplete file.

A signal raises ``KeyboardInterrupt`` in the main thread, whose ``finally`` blocks clean up. That can take long: the
training loop defers it until its step is saved, and Python runs no signal handler during a call into compiled code. A
watchdog thread therefore also receives the signal, through a pipe that the C part of the handler writes to. If the
process still runs after ``GRACE_S``, the watchdog removes incomplete files and ends it. Complete files are safe: they
get their names by renaming, under a lock that the watchdog takes first and never releases. A second signal ends the
process at once, in the same way.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130

#: Seconds between a signal and the forced exit.
GRACE_S = 7.5
#: The same after a second signal.
_GRACE_AGAIN_S = 1.0
#: Signals within this time count as one: ``timeout`` sends its signal twice.
_SAME_REQUEST_S = 0.5
#: Time limit for each part of the cleanup, because a terminal or a disk may hang.
_CLEANUP_S = 0.7

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


class _Request:
    """The state of a request to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at = 0.0
        self.seen: signal.Signals | None = None  # set by the watchdog, before the handler runs
        self.grace_s: float | None = None
        self.deferred = False
        self.explain: Callable[[], str] = _explain
        self.explained = False


_request: _Request
_installed = False
_handled_by_program = False
_first_only = False
#: What the watchdog calls before it ends the process, oldest first.
_cleanups: dict[object, Callable[[], object]] = {}
#: Held while a complete file or folder is renamed to its final name.
renaming = threading.RLock()


def install() -> None:
    """Installs signal handlers and the watchdog; called once, by the ``ingle`` command.

    Programs that import Ingle as a library use :func:`listening` instead, without a watchdog.
    """
    global _installed
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _handle)
    # A forked child would write to our pipe until it executes another program.
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reader,), name="ingle-stop", daemon=True).start()
    _installed = True


@contextmanager
def listening() -> Iterator[None]:
    """Makes signals raise ``KeyboardInterrupt`` in the block, for programs that did not call :func:`install`.

    Does nothing outside the main thread, where Python does not allow signal handlers.
    """
    global _request
    if _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = _Request()
    former = {number: signal.signal(number, _handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _request = _Request()


def requested() -> signal.Signals | None:
    """Returns the signal that requested a stop; None if there was none."""
    return _request.signal


@contextmanager
def deferred() -> Iterator[None]:
    """Defers ``KeyboardInterrupt`` to the end of the block, which polls :func:`requested`.

    A second signal raises it at once.
    """
    with polled():
        yield
    if _request.signal is not None:
        raise KeyboardInterrupt


@contextmanager
def polled() -> Iterator[None]:
    """Lets the block handle a stop request, which it polls by :func:`requested`.

    A second signal raises ``KeyboardInterrupt``.
    """
    _request.deferred = True
    try:
        yield
    finally:
        _request.deferred = False


@contextmanager
def at_once() -> Iterator[None]:
    """Raises ``KeyboardInterrupt`` for a stop request in the block although :func:`deferred` encloses it."""
    former, _request.deferred = _request.deferred, False
    try:
        if _request.signal is not None:
            raise KeyboardInterrupt
        yield
    finally:
        _request.deferred = former


@contextmanager
def grace(seconds: float | None) -> Iterator[None]:
    """Sets the time between a signal in the block and the forced exit; None keeps it."""
    former = _request.grace_s
    _request.grace_s = seconds if seconds is not None else former
    try:
        yield
    finally:
        _request.grace_s = former


@contextmanager
def handled_by_program() -> Iterator[None]:
    """Lets the block catch ``KeyboardInterrupt`` and continue after Ctrl-C; SIGTERM still ends the process."""
    global _handled_by_program
    _handled_by_program = True
    try:
        yield
    finally:
        _handled_by_program = False


@contextmanager
def explained(explain: Callable[[], str]) -> Iterator[None]:
    """Makes the watchdog print the result of ``explain`` if it ends the process within the block."""
    former, _request.explain = _request.explain, explain
    try:
        yield
    finally:
        _request.explain = former


@contextmanager
def on_forced_exit(cleanup: Callable[[], object]) -> Iterator[None]:
    """Makes the watchdog call ``cleanup`` if it ends the process within the block."""
    key = object()
    _cleanups[key] = cleanup
    try:
        yield
    finally:
        _cleanups.pop(key, None)


def explanation() -> str:
    """Returns the message for the user about the interruption."""
    return _request.explain()


def silence_watchdog() -> None:
    """Keeps the watchdog from printing a message, because the user has seen one."""
    _request.explained = True


def leave(code: int = EXIT_CODE) -> NoReturn:
    """Ends the process after an interruption, or with an error while other threads still wait for something.

    A normal exit would wait for every thread, and unload libraries while the watchdog is already frozen.
    """
    silence_watchdog()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def by_signal() -> str:
    """Returns what follows "Stopped" in a message: `` by SIGTERM``, or nothing if there was no signal."""
    received = _request.signal or _request.seen
    return f" by {received.name}" if received is not None else ""


def _explain() -> str:
    return f"Stopped{by_signal()}. No incomplete file is left."


_request = _Request()


def _handle(number: int, frame: FrameType | None) -> None:
    """Handles a signal; Python calls this in the main thread, between two bytecode instructions."""
    if _handled_by_program and number == signal.SIGINT:
        raise KeyboardInterrupt
    now = time.monotonic()
    if _request.signal is None:
        _request.signal, _request.at = signal.Signals(number), now
        if _request.deferred:
            return
    elif now - _request.at < _SAME_REQUEST_S or (_installed and not _request.deferred) or _first_only:
        return  # do not interrupt the cleanup; the watchdog limits its time
    _request.deferred = False
    raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """Runs in the watchdog thread: ends the process if it still runs some time after a signal."""
    first: float | None = None
    deadline: float | None = None
    while True:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], timeout)[0]:
            _end()
        numbers = {number for number in os.read(reader, 64) if number in _SIGNALS}
        if not numbers or (_handled_by_program and numbers == {signal.SIGINT}):
            continue
        now = time.monotonic()
        if first is None or deadline is None:
            first, deadline = now, now + (GRACE_S if _request.grace_s is None else _request.grace_s)
        elif now - first > _SAME_REQUEST_S and not _first_only:
            deadline = min(deadline, now + _GRACE_AGAIN_S)
        _request.seen = _request.seen or signal.Signals(min(numbers))


def force_exit(code: int, say: Callable[[], object] = lambda: None) -> NoReturn:
    """Ends the process from any thread, after the cleanups and ``say``, each of which has a time limit."""
    if renaming.acquire(timeout=_CLEANUP_S):  # never released, so that no file is renamed anymore
        _attempt(_clean_up)
    _attempt(say)
    os._exit(code)


def _end() -> NoReturn:
    force_exit(EXIT_CODE, lambda: None if _request.explained else _print())


def ignore_repetitions() -> None:
    """Makes only the first signal count.

    For ranks: their launcher passes signals on, and a scheduler may send the same ones to all processes.
    """
    global _first_only
    _first_only = True


def end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent process ends; only Linux can do this."""
    if sys.platform == "linux":
        import ctypes  # here, because most commands do without it

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_CODE)


def _clean_up() -> None:
    for cleanup in reversed(list(_cleanups.values())):
        with suppress(Exception):  # the others must still run
            cleanup()


def _print() -> None:
    message = f"Interrupted: {explanation()}\n"
    if sys.stderr.isatty():
        message = f"\r\x1b[K\x1b[?25h{message}"  # a progress bar hides the cursor
    os.write(2, message.encode(errors="replace"))


def _attempt(action: Callable[[], object]) -> None:
    """Runs ``action`` with a time limit."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_CLEANUP_S)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
