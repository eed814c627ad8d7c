"""A process that runs reward functions; it reads groups and writes scores as frames."""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ingle.errors import RewardError
from ingle.rewards.frames import encode, receive
from ingle.rewards.functions import Answers, Log, Scorer, load
from ingle.stopping import end_with

#: Longest description of an error.
_MAX_CHARS = 500


class _OutOfTime(BaseException):
    """The time is up. Not an ``Exception``, so that fewer handlers inside of a function catch it."""


class _Alarm:
    """Raises :class:`_OutOfTime` in the main thread if a block takes too long."""

    def __init__(self) -> None:
        self._is_set = False

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        signal.signal(signal.SIGALRM, self._ring)  # the function may have replaced it
        self._is_set = True
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.25)  # again, for code that catches everything
        try:
            yield
        finally:
            self._is_set = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._is_set:
            raise _OutOfTime


def outcome(value: Any) -> tuple[float | None, str, str]:
    """Returns the score, the status and the error that a returned value means."""
    if value is None:
        return None, "none", ""
    if isinstance(value, Exception):
        return None, "timeout" if isinstance(value, TimeoutError) else "error", _message(value)
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None, "invalid", f"it returned {_clip(repr(value))} instead of a number"
    number = float(value)
    if not math.isfinite(number):
        return None, "invalid", f"it returned {number}"
    return number, "ok", ""


class _Worker:
    def __init__(self, writer: int, scorers: list[Scorer]) -> None:
        self._writer, self._scorers = writer, scorers
        self._own, self._alarm = os.getpid(), _Alarm()

    def score(self, request: Mapping[str, Any]) -> None:
        """Scores the answers of a request: one frame for all, or one for each."""
        scorer = self._scorers[request["function"]]
        answers = Answers.of(request)
        parts = answers.each() if scorer.is_per_answer else [answers]
        for part in parts:
            log = Log()
            frame = self._attempt(partial(scorer.score, part, log), len(part), request["limit_s"])
            self._send({"id": request["id"]} | frame | log.as_frame(len(part)))

    def _attempt(self, call: Callable[[], list[Any]], count: int, limit_s: float) -> dict[str, Any]:
        try:
            with self._alarm.limited(limit_s):
                values = call()
                if len(values) != count:
                    why = f"it returned {len(values):,} scores for {count:,} answers"
                    return {"failed": ["invalid", why]}
                return {"outcomes": [outcome(value) for value in values]}
        except _OutOfTime:
            return {"failed": ["timeout", f"it took more than {limit_s:g} s"]}
        except BaseException as error:  # a function may raise anything, SystemExit included
            return {"failed": ["error", _describe(error)]}

    def _send(self, frame: Mapping[str, Any]) -> None:
        sys.stdout.flush()
        if os.getpid() != self._own:
            os._exit(0)  # the function forked, and this is the copy
        write(self._writer, frame)


def write(writer: int, frame: Mapping[str, Any]) -> None:
    """Writes a frame; without what the function logged if that is no JSON."""
    try:
        data = encode(frame)
    except (ValueError, RecursionError, TypeError):
        data = encode({key: value for key, value in frame.items() if key not in ("extra", "metrics")})
    while data:
        data = data[os.write(writer, data) :]


def _describe(error: BaseException) -> str:
    """Returns the type, the message and the last line of user code of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(__file__).parent
    place = next(
        (
            f"{each.filename}:{each.lineno}"
            for each in reversed(frames)
            if Path(each.filename).parent != own and not each.filename.startswith("<frozen ")
        ),
        "",
    )
    return _message(error) + (f" ({place})" if place else "")


def _message(error: BaseException) -> str:
    try:
        return _clip(f"{type(error).__name__}: {error}")
    except Exception:  # its own code makes the message
        return type(error).__name__


def _problem(error: BaseException, options: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns the arguments of the error for a reward that cannot be loaded."""
    if isinstance(error, RewardError):
        return {name: getattr(error, name) for name in ("message", "where", "why", "fix")}
    where = f"{options['where']}, {options.get('path', options['kind'])}"
    fix = "correct the file, or install what it imports"
    return {"message": "A reward function cannot be loaded.", "where": where, "why": _describe(error), "fix": fix}


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 3] + "..."


def _limit_memory(megabytes: int) -> None:
    """Limits the memory to what is taken now and so many megabytes; only Linux can do this."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + (megabytes << 20)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def main() -> None:
    """Scores groups until the pipe is closed."""
    reader, writer = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a function prints must not become part of a frame
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    setup = receive(reader)
    end_with(setup["parent"])
    scorers = []
    for options in setup["rewards"]:
        try:
            scorers.append(load(options))
        except BaseException as error:
            write(writer, {"problem": _problem(error, options)})
            return
    _limit_memory(setup["memory_mb"])
    write(writer, {"ready": [scorer.is_per_answer for scorer in scorers]})
    worker = _Worker(writer, scorers)
    while (request := receive(reader)) is not None:
        worker.score(request)
