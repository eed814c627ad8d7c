"""Ctrl-C and SIGTERM: they end every phase of every command within ten seconds, and leave no incomplete file.

A signal raises ``KeyboardInterrupt`` in the main thread, whose ``finally`` blocks clean up.  Two things may delay that:

- The training loop defers it, to finish its step and to save.
- Python runs a signal handler between two of its own instructions, never inside a call into compiled code.

So a watchdog thread learns of the signal as well, through a pipe that the C half of the handler writes to.  If the
process still runs after ``GRACE_S``, the watchdog removes what is incomplete and ends it.  It can damage no file:
files get their names by renaming, under a lock that the watchdog takes first and never gives back.

A second signal ends the process at once, with the same care.
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

#: Seconds from a signal until the watchdog ends the process.
GRACE_S = 7.5
#: The same for a second signal.
_GRACE_AGAIN_S = 1.0
#: Signals this close to the first one are the same request: ``timeout`` sends its signal twice.
_SAME_REQUEST_S = 0.5
#: Seconds that the watchdog spends on each part of cleaning up; a terminal or a disk may hang.
_CLEANUP_S = 0.7

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Request:
    """The request to stop, as the handler in the main thread sees it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at = 0.0
        self.seen: signal.Signals | None = None  # by the watchdog, which learns of it earlier
        self.deferred = False
        self.explain: Callable[[], str] = _explain
        self.explained = False


_request: _Request
_installed = False
_handled_by_program = False
#: Undoes what must not outlive the process, oldest first.
_undo: dict[object, Callable[[], object]] = {}
#: Held while a complete file or folder gets its name.
renaming = threading.RLock()


def install() -> None:
    """Makes signals end this process; called once, by the program itself.

    The process then belongs to Ingle.  Python code that imports Ingle as a library gets :func:`listening` instead,
    without the watchdog.
    """
    global _installed
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _handle)
    # A child that has not started another program yet would write to our pipe.
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reader,), name="ingle-stop", daemon=True).start()
    _installed = True


@contextmanager
def listening() -> Iterator[None]:
    """Has signals raise ``KeyboardInterrupt`` while the block runs, also in programs that did not :func:`install`.

    Outside the main thread Python does not allow that; signals then do what they did before.
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
    """The signal that asked to stop, None so far."""
    return _request.signal


@contextmanager
def deferred() -> Iterator[None]:
    """Holds ``KeyboardInterrupt`` back until the end of the block, which looks at :func:`requested` now and then.

    A second signal raises it at once.
    """
    _request.deferred = True
    try:
        yield
    finally:
        _request.deferred = False
    if _request.signal is not None:
        raise KeyboardInterrupt


@contextmanager
def handled_by_program() -> Iterator[None]:
    """Leaves Ctrl-C to the block, which catches ``KeyboardInterrupt`` and continues; SIGTERM still ends the process."""
    global _handled_by_program
    _handled_by_program = True
    try:
        yield
    finally:
        _handled_by_program = False


@contextmanager
def explained(explain: Callable[[], str]) -> Iterator[None]:
    """Has the watchdog print what ``explain`` returns, if it has to end the process within the block."""
    former, _request.explain = _request.explain, explain
    try:
        yield
    finally:
        _request.explain = former


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Has the watchdog call ``undo``, if it has to end the process within the block."""
    key = object()
    _undo[key] = undo
    try:
        yield
    finally:
        _undo.pop(key, None)


def explanation() -> str:
    """What to tell the user about the end of the program."""
    return _request.explain()


def silence_watchdog() -> None:
    """The user has been told: if the watchdog has to end the process all the same, it prints nothing."""
    _request.explained = True


def leave() -> NoReturn:
    """Ends the process after an interruption.

    Python would first wait for every thread, and tear down the libraries after it has frozen the watchdog.
    """
    silence_watchdog()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(EXIT_CODE)


def by_signal() -> str:
    """What follows "Stopped": `` by SIGTERM``, or nothing when no signal was received."""
    received = _request.signal or _request.seen
    return f" by {received.name}" if received is not None else ""


def _explain() -> str:
    return f"Stopped{by_signal()}. No incomplete file is left."


_request = _Request()


def _handle(number: int, frame: FrameType | None) -> None:
    """Runs in the main thread, between two instructions."""
    if _handled_by_program and number == signal.SIGINT:
        raise KeyboardInterrupt
    now = time.monotonic()
    if _request.signal is None:
        _request.signal, _request.at = signal.Signals(number), now
        if _request.deferred:
            return
    elif now - _request.at < _SAME_REQUEST_S or (_installed and not _request.deferred):
        return  # cleaning up must not be interrupted; the watchdog limits its time
    _request.deferred = False
    raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """The watchdog's thread: ends the process when a signal has been there for too long."""
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
            first, deadline = now, now + GRACE_S
        elif now - first > _SAME_REQUEST_S:
            deadline = min(deadline, now + _GRACE_AGAIN_S)
        _request.seen = _request.seen or signal.Signals(min(numbers))


def _end() -> NoReturn:
    """Ends the process from the watchdog's thread."""
    if renaming.acquire(timeout=_CLEANUP_S):  # never released: nothing gets a name any more
        _attempt(_undo_all)
    if not _request.explained:
        _attempt(_print)
    os._exit(EXIT_CODE)


def _undo_all() -> None:
    for undo in reversed(list(_undo.values())):
        try:
            undo()
        except Exception:  # one that fails must not keep the others from being undone
            continue


def _print() -> None:
    message = f"Interrupted: {explanation()}\n"
    if sys.stderr.isatty():
        message = f"\r\x1b[K\x1b[?25h{message}"  # a progress bar hides the cursor
    os.write(2, message.encode(errors="replace"))


def _attempt(action: Callable[[], None]) -> None:
    """Runs ``action`` for a limited time."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_CLEANUP_S)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
