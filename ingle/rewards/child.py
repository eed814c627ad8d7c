"""A process that runs reward functions, as the pool sees it."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import IO, Any

from ingle import env
from ingle.errors import RewardError
from ingle.rewards.frames import decode, encode

#: Seconds in which the modules of all functions are to be imported.
_LOAD_LIMIT_S = 300.0
#: Seconds that a process gets beyond the limit that it sets itself.
_GRACE_S = 2.0
#: Seconds between looks at whether the process still runs.
_TICK_S = 0.5
#: What is kept of the last lines that a process printed.
_MAX_PRINTED = 64 << 10


class Lost(Exception):
    """The process ended, hung or wrote nonsense.

    Attributes:
        status: ``timeout`` or ``crashed``.
    """

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Child:
    """Runs the functions of a setup; the process is started again after it was lost.

    Args:
        setup: The first frame.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = encode(dict(setup) | {"parent": os.getpid()})
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._buffer, self._printed = bytearray(), bytearray()
        self._number = 0
        #: Whether each function scores answers one by one.
        self.is_per_answer: list[bool] = []

    def start(self) -> None:
        """Starts the process and waits until it has loaded its functions.

        Raises:
            RewardError: A function cannot be loaded.
        """
        self._launch()
        try:
            reply = next(self._exchange(self._setup, _LOAD_LIMIT_S))
        except Lost as lost:
            raise RewardError(
                "The process of the reward functions does not start.",
                where="objective.rewards",
                why=f"{lost}{self._last_words()}",
            ) from None
        if "problem" in reply:
            self.stop()
            raise RewardError(**reply["problem"])
        self.is_per_answer = reply["ready"]

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
        """Sends a request and yields the frames that come back; the caller knows how many.

        Args:
            request: The request.
            limit_s: Seconds for each frame.

        Raises:
            Lost: The process was lost. The next request starts another one.
            RewardError: It cannot be started again.
        """
        if self._process is None:
            self.start()
        self._number += 1
        for frame in self._exchange(encode(dict(request) | {"id": self._number}), limit_s):
            if frame.get("id") != self._number:
                raise self._lose("crashed", "something else was written to its pipe")
            yield frame

    def printed(self) -> list[str]:
        """Returns the lines printed since the last call."""
        lines = self._printed.decode(errors="replace").splitlines()
        self._printed.clear()
        return [line for line in lines if line.strip()]

    def stop(self) -> None:
        """Ends the process and those that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(BrokenPipeError):
                _open(pipe).close()

    def close(self) -> None:
        """Ends the process for good; another thread may be waiting for it."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _launch(self) -> None:
        with self._lock:
            if self._is_closed:
                raise Lost("crashed", "the pool is closed")
            self._buffer.clear()
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from ingle.rewards.worker import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env.single_thread_environment(),
                process_group=0,  # Ctrl-C stops this process, which then ends its children
            )
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            os.set_blocking(_open(pipe).fileno(), False)

    def _exchange(self, data: bytes, limit_s: float) -> Iterator[dict[str, Any]]:
        """Writes ``data`` and yields frames, while it keeps the error output flowing."""
        process = self._process
        assert process is not None, "the process was started"
        with selectors.DefaultSelector() as selector:
            selector.register(_open(process.stdin), selectors.EVENT_WRITE)
            for pipe in (process.stdout, process.stderr):
                selector.register(_open(pipe), selectors.EVENT_READ)
            end = time.monotonic() + limit_s + _GRACE_S
            while True:
                try:
                    frame = decode(self._buffer)
                except ValueError as error:
                    raise self._lose("crashed", f"something else was written to its pipe: {error}") from None
                if frame is not None:
                    yield frame
                    end = time.monotonic() + limit_s + _GRACE_S
                    continue
                remaining = end - time.monotonic()
                if remaining <= 0:
                    raise self._lose("timeout", f"it took more than {limit_s:g} s and was ended")
                is_over = process.poll() is not None
                events = selector.select(0 if is_over else min(remaining, _TICK_S))
                if is_over and not events:
                    raise self._lose("crashed", _end_of(process))
                for key, _ in events:
                    if key.fileobj is process.stdin:
                        data = self._write(selector, _open(process.stdin), data)
                    elif not self._read(key.fd, key.fileobj is process.stdout):
                        selector.unregister(key.fileobj)

    def _write(self, selector: selectors.BaseSelector, pipe: IO[bytes], data: bytes) -> bytes:
        try:
            data = data[os.write(pipe.fileno(), data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:
            data = b""  # the process has ended, or will be found to hang
        if not data:
            selector.unregister(pipe)
        return data

    def _read(self, descriptor: int, is_frames: bool) -> bool:
        """Reads what is there; returns False at the end of the pipe."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        if is_frames:
            self._buffer += data
        elif len(self._printed) < _MAX_PRINTED:
            self._printed += data
        return bool(data)

    def _lose(self, status: str, why: str) -> Lost:
        self.stop()
        return Lost(status, why)

    def _last_words(self) -> str:
        lines = self.printed()
        return f"; it wrote: {lines[-1][:300]}" if lines else ""


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "all pipes were requested"
    return pipe


def _end_of(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code >= 0:
        return f"its process ended with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"its process was ended by {name}"
