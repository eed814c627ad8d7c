"""From what happened to an exit code: the only place that knows them.

=====  =========================================================================================
0      Done, or nothing left to do.
1      A bug in Ingle.
2      A mistake of the user.
130    Interrupted; nothing incomplete is left, and a run continues from its last checkpoint.
=====  =========================================================================================
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ingle import stopping
from ingle.errors import Explained, IngleError, Interrupted

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, stopping.EXIT_CODE

#: What the system refuses for reasons that lie with the user's disk or rights.
_USERS_ERRNOS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
#: Frames of a bug's traceback that are shown without ``--debug``.
_SHOWN_FRAMES = 4


def call(arguments: Sequence[str]) -> int:
    """Runs a command and reports how it ended.

    Args:
        arguments: The words after ``ingle``.

    Returns:
        The exit code.
    """
    from ingle.cli.app import app

    words = [word for word in arguments if word != "--debug"]
    debug = len(words) < len(arguments)
    try:
        result: Any = app(words or ["--help"], prog_name="ingle", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:  # the library that reads options makes this of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else DONE
    except BaseException as error:
        if debug and not isinstance(error, SystemExit | typer.Exit):
            traceback.print_exc()
        return _tell(error)


def _tell(error: BaseException) -> int:
    """Prints what went wrong on standard error."""
    if _is_broken_pipe(error):
        # Whoever read our output has seen enough; Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    match error:
        case SystemExit() | typer.Exit():
            code = getattr(error, "exit_code", getattr(error, "code", DONE))
            return code if isinstance(code, int) else DONE
        case Interrupted():
            return _tell_interrupted(error)
        case KeyboardInterrupt() | typer.Abort():
            return _tell_interrupted(Interrupted(stopping.explanation()))
        case _ if type(error).__name__ == "NoArgsIsHelpError":
            return DONE  # the help of a group was shown
    mistake = as_mistake(error)
    if mistake is not None:
        _print(mistake)
        return MISTAKE
    if stopping.requested() is not None:
        # Ctrl-C reaches the processes that we started as well, and their end looks like an error to who waits for them.
        return _tell_interrupted(Interrupted(stopping.explanation()))
    _print_bug(error)
    return BUG


def _tell_interrupted(error: Interrupted) -> int:
    _print(error)
    stopping.silence_watchdog()
    return INTERRUPTED


def _is_broken_pipe(error: BaseException) -> bool:
    """Whether the reader of our output went away; the command-line library turns that into SystemExit."""
    causes = (error, error.__context__) if isinstance(error, SystemExit) else (error,)
    return any(isinstance(cause, OSError) and cause.errno == errno.EPIPE for cause in causes)


def as_mistake(error: BaseException) -> IngleError | None:
    """The error as a mistake of the user; None when it is a bug."""
    if isinstance(error, IngleError):
        return error
    if hasattr(error, "format_message") and hasattr(error, "ctx"):
        return _usage_error(error)
    if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
        # An incomplete file has a name of ours; the user knows the final one.
        where = re.sub(r"\.partial-.*", "", str(error.filename)) if error.filename is not None else None
        return IngleError(f"{error.strerror}.", where=where, fix="check the path, its permissions and the free space")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return IngleError(
            "There is not enough memory.",
            why=str(error).strip().split("\n")[0] or None,
            fix="--train.micro_batch_size=1, --train.recompute=true, --base.format=nf4 or a smaller --data.max_seq_len",
        )
    return None


def _usage_error(error: Any) -> IngleError:
    command = getattr(error.ctx, "command_path", "ingle") if error.ctx is not None else "ingle"
    message = re.sub(r", unable to parse .*|Value error, ", "", error.format_message())
    message = message.replace("Input should be", "it must be")
    return IngleError(message, fix=f"`{command} --help` shows what can be typed")


def _print(error: Explained) -> None:
    console = Console(stderr=True, highlight=False)
    head, *rest = str(error).split("\n")
    name = "Error" if type(error) is IngleError else type(error).__name__
    console.print(Text.assemble((f"{name}: ", "bold red"), head), soft_wrap=True)
    for line in rest:
        console.print(Text(line), soft_wrap=True)


def _print_bug(error: BaseException) -> None:
    console = Console(stderr=True, highlight=False)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parents[1])]
    shown = (own or list(frames))[-_SHOWN_FRAMES:]
    if frames and frames[-1] not in shown:
        shown.append(frames[-1])
    lines = [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in shown]
    console.print(Text.assemble(("Bug: ", "bold red"), f"{type(error).__name__}: {error}"), soft_wrap=True)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    console.print(
        Text(
            "  fix    this should not happen: please report it with the command, the lines that --debug shows,\n"
            "         and what `ingle doctor` prints"
        ),
        soft_wrap=True,
    )
