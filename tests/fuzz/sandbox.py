"""Runs a case in a forked process with limits: 20 s of processor time and 2 GiB of additional memory."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import io
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle.cli import exit_status

MAX_CPU_S = 20
MAX_BYTES = 2 << 30
#: Ends cases that sleep; long, because a busy machine gives little processor time.
_MAX_WALL_S = 240
_MAX_FILE_BYTES = 1 << 30

_OUT_OF_MEMORY = re.compile(
    r"not enough memory|MemoryError|can't allocate memory|malloc of size|Cannot allocate memory|not be allocated", re.I
)

#: Kinds of results; only the first two are correct.
SUCCESS, REFUSED, BUG, CRASH, HANG, MEMORY, LITTER, WRONG = (
    *("success", "refused", "bug", "crash", "hang", "memory", "litter", "wrong"),
)


@dataclass(frozen=True)
class Outcome:
    """The result of a case.

    Attributes:
        kind: One of the constants above.
        answer: The answer of the target, as JSON.
        message: The message to the user, or the traceback.
        cause: A text that is equal for failures with the same likely cause.
        cpu_s: Processor time in seconds.
    """

    kind: str
    answer: Any = None
    message: str = ""
    cause: str = ""
    cpu_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Returns whether the case failed."""
        return self.kind not in (SUCCESS, REFUSED)


class Refused(Exception):
    """A command ended with exit code 2."""


class Broke(Exception):
    """A command ended with an exit code other than 0 and 2."""


def command(*words: str | Path) -> str:
    """Runs ``ingle`` with these words in this process; returns its standard output."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_status.run_command([*map(str, words)])
    if code == exit_status.SUCCESS:
        return out.getvalue()
    if code == exit_status.USER_ERROR:
        raise Refused(err.getvalue())
    raise Broke(f"exit code {code}\n{err.getvalue()}")


class Place:
    """The folders of a case: its input, its working folder, and folders that it must not change."""

    def __init__(self, root: Path) -> None:
        self.input, self.work, self.home, self.temporary = (root / name for name in ("input", "work", "home", "tmp"))
        self.out = self.work / "out"  # the only folder in which a case may leave files
        self.log = root / "log"
        for folder in (self.input, self.work, self.home, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)

    def litter(self) -> list[str]:
        """Returns the files outside the output folder."""
        found = (path for folder in (self.work, self.home, self.temporary) for path in folder.rglob("*"))
        return sorted(str(path) for path in found if path.is_file() and not path.is_relative_to(self.out))


def digest(folder: Path) -> str:
    """Returns the SHA-256 of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(f"{path.relative_to(folder)}\0{path.lstat().st_mode}\0".encode())
        if path.is_file():
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def run(act: Callable[[], Any], place: Place, *, limited: bool = True) -> Outcome:
    """Runs a function, whose answer must be JSON, in a forked process; ``limited`` applies the limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become_a_case(place, limited=limited)
        result = _attempt(act)
        try:
            text = json.dumps(result)
        except (ValueError, TypeError) as error:
            text = json.dumps({"kind": BUG, "message": f"the answer is no JSON: {error}"})
        with contextlib.suppress(BaseException):
            _write(writer, text.encode("utf-8", "surrogatepass"))
        os._exit(0)
    os.close(writer)
    text, late = _read(reader, _MAX_WALL_S if limited else 3600)
    if late:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its child processes
    cpu_s = usage.ru_utime + usage.ru_stime
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return Outcome(HANG, message=f"{cpu_s:.0f} s of processor time", cause=f"hang {_where(place)}", cpu_s=cpu_s)
    if os.WIFSIGNALED(status) or not text:
        code = os.waitstatus_to_exitcode(status)
        end = signal.Signals(-code).name if code < 0 else f"exit {code}"
        log = place.log.read_text(errors="replace")[-2000:]
        kind = MEMORY if _OUT_OF_MEMORY.search(log) else CRASH
        return Outcome(kind, message=f"{end}\n{log}", cause=f"{end} {_where(place)}", cpu_s=cpu_s)
    return Outcome(**json.loads(text), cpu_s=cpu_s)


def warm_up(act: Callable[[], Any]) -> None:
    """Calls a function in this process, so that cases need not import modules and load kernels again."""
    with quiet():
        act()
    gc.collect()
    gc.freeze()  # so that collections in a child do not copy shared pages


def _become_a_case(place: Place, *, limited: bool) -> None:
    os.setpgid(0, 0)
    silence, log = os.open(os.devnull, os.O_RDONLY), os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((silence, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ |= {"HOME": str(place.home), "TMPDIR": str(place.temporary)}
    tempfile.tempdir = None
    os.chdir(place.work)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # recreates the thread pool, which two threads of a child must not do at once
    if not limited:
        return

    faulthandler.enable()
    faulthandler.dump_traceback_later(MAX_CPU_S * 0.9, exit=False)  # prints where it hangs
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_BYTES, size + MAX_BYTES))


def _attempt(act: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"kind": SUCCESS, "answer": act()}
    except Refused as refused:
        return _refusal(str(refused))
    except BaseException as error:
        mistake = None if isinstance(error, Broke) else exit_status.as_user_error(error)
        if mistake is not None:
            return _refusal(f"{type(mistake).__name__}: {mistake}")
        text = traceback.format_exc()
        kind = MEMORY if _OUT_OF_MEMORY.search(text) else BUG
        return {"kind": kind, "message": text[-6000:], "cause": _cause(text)}


def _refusal(text: str) -> dict[str, Any]:
    if _OUT_OF_MEMORY.search(text):
        return {"kind": MEMORY, "message": text[-4000:], "cause": "out of memory"}
    if "Traceback (most recent" in text or len(text) > 8000:
        return {"kind": BUG, "message": text[:4000], "cause": "an unreadable refusal"}
    return {"kind": REFUSED, "message": text}


def _cause(trace: str) -> str:
    """Returns the error and the last frame of Ingle in a traceback."""
    if bug := re.search(r"^Bug: (\w+)", trace, re.MULTILINE):  # as printed by a command
        frames, kind = re.findall(r"/(ingle/\S+?):\d+ in (\w+)", trace), bug[1]
    else:
        frames = re.findall(r'File "[^"]*?/(ingle/[^"]+)", line \d+, in (\w+)', trace)
        errors = re.findall(r"^([\w.]*(?:Error|Exception|Exit|Interrupt|Broke))\b", trace, re.MULTILINE)
        kind = errors[-1] if errors else trace.strip().splitlines()[-1][:60]
    return f"{kind} in {' '.join(frames[-1])}" if frames else f"{kind} outside"


def _where(place: Place) -> str:
    """Returns the last frame of Ingle in the log."""
    frames = re.findall(r'File "[^"]*?/(ingle/[^"]+)", line \d+ in (\w+)', place.log.read_text(errors="replace"))
    return " ".join(frames[0]) if frames else "at an unknown place"


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read(descriptor: int, seconds: float) -> tuple[str, bool]:
    """Reads a pipe to its end; also returns whether that took too long."""
    parts, end = [], time.monotonic() + seconds
    try:
        while True:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return "", True
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b"".join(parts).decode("utf-8", "surrogatepass"), False
            parts.append(part)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the output of libraries."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield
    sys.stdout.flush()
