from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ingle import errors
from ingle.cli import exit_status
from ingle.cli.exit_status import run_command


def test_interrupted_is_not_an_exception() -> None:
    assert not issubclass(errors.Interrupted, Exception)
    assert str(errors.Interrupted("stopped.", fix="again")) == "stopped.\n  fix    again"


Raise = Callable[[BaseException], None]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Raise:
    """Makes ``ingle train --resume x`` raise an error."""

    def install(error: BaseException) -> None:
        def resume(*_: Any) -> None:
            raise error

        fake = SimpleNamespace(resume=resume)
        monkeypatch.setitem(sys.modules, "ingle.flow", fake)
        monkeypatch.setattr("ingle.flow", fake, raising=False)

    return install


TRAIN = ["train", "--resume", "x"]


def test_a_user_error_is_printed_without_traceback(fails: Raise, capsys: pytest.CaptureFixture[str]) -> None:
    fails(errors.DoesNotFit("too big [4 GiB].", where="here", why="1\n2", fix="less"))
    assert run_command(TRAIN) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "DoesNotFit: too big [4 GiB].\n  where  here\n  why    1\n         2\n  fix    less\n"


@pytest.mark.parametrize("words", [[*TRAIN, "--debug"], ["--debug", *TRAIN]])
def test_debug_shows_the_traceback_and_keeps_the_code(
    fails: Raise, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    fails(errors.DataError("bad row."))
    assert run_command(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("DataError: bad row.\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.Interrupted("stopped: step 3 is saved.", fix="again"), 130, "Interrupted: stopped: step 3 is saved."),
        (KeyboardInterrupt(), 130, "Interrupted: Stopped. No incomplete file is left."),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "Error: No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "where  runs/x"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "Error: File name too long."),
        (OSError(errno.EROFS, "Read-only file system", "a.gguf.partial-7-whole.partial-7"), 2, "where  a.gguf\n"),
        (MemoryError(), 2, "There is not enough memory."),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. 3 GiB"), 2, "CUDA out of memory. 3 GiB"),
    ],
)
def test_codes(fails: Raise, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str) -> None:
    fails(error)
    assert run_command(TRAIN) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_bug_is_printed_with_its_place_and_how_to_report_it(fails: Raise, capsys: pytest.CaptureFixture[str]) -> None:
    fails(ZeroDivisionError("oh [no]"))
    assert run_command(TRAIN) == 1
    err = capsys.readouterr().err
    assert err.startswith("Bug: ZeroDivisionError: oh [no]\n")
    assert "training.py" in err and __file__ in err and "ingle doctor" in err
    assert "Traceback" not in err


def test_a_bug_with_debug_shows_everything(fails: Raise, capsys: pytest.CaptureFixture[str]) -> None:
    fails(ZeroDivisionError("oh"))
    assert run_command([*TRAIN, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["config", "shw"], "Did you mean 'show'?"),
        (["generate"], "Missing argument 'MODEL_OR_RUN'"),
        (["generate", "m", "--promt", "x"], "--promt"),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "0"], "it must be greater than or equal to 1\n"),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "many"], "it must be a valid integer\n"),
        (["generate", "m", "--prompt", "x", "--batch-size", "9" * 30], "is too large."),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "9" * 6000], "Invalid value for '--max-new-tokens'"),
        (["generate", "m", "--prompt", "x", "--seed", "-1"], "it must be greater than or equal to 0\n"),
        (["chat", "m", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["export", "m", "--to", "gguf", "--out", "e", "--max-kl", "inf"], "--max-kl inf is not a finite number.\n"),
        (["generate", "m", "--prompt", "x", "--top-p", "0"], "--top-p must be above 0."),
        (["generate", "m", "--prompt", "x", "--stop", "", "--json"], "An empty --stop"),
        (["generate", "m", "--prompt", ""], "where  --prompt\n"),
        (["export", "m", "--to", "foo", "--out", "e"], "Invalid value for '--to': 'foo' is not one of 'peft', "),
        (["doctor", "x"], "unexpected extra argument"),
        (["train", "--resume"], "requires an argument"),
        (["train"], "No config file is given."),
        (["train", "a.yaml", "b.yaml"], "The command accepts one config file, not 2: a.yaml, b.yaml."),
        (["train", "nowhere.yaml"], "The config file does not exist."),
        (["train", "a.yaml", "--resum", "x"], "did you mean --resume?"),
        (["train", "a.yaml", "--dry-rnu"], "did you mean --dry-run?"),
        (["train", "a.yaml", "-x"], "-x is not an option of this command."),
        (["train", "a.yaml", "--resume", "x"], "--resume cannot be combined with a config"),
        (["evaluate", "m"], "m is not a run, so it has no task of its own."),
        (["evaluate", "m", "--task", "nowhere.yaml"], "does not exist"),
        (["evaluate", "m", "--tsk", "t.yaml"], "did you mean --task?"),
    ],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert run_command(words) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


@pytest.mark.parametrize("words", [[], ["--help"], ["config"], ["data"], ["train", "-h"], ["--version"]])
def test_help_exits_with_0(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run_command(words) == 0
    out, err = capsys.readouterr()
    assert out.strip() and err == ""


def test_every_ingle_error_is_a_user_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.IngleError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert exit_status.as_user_error(kind("x")) is not None
    assert exit_status.as_user_error(FileNotFoundError(errno.ENOENT, "x")) is None
    assert exit_status.as_user_error(AssertionError()) is None
