"""Signals end a process in whatever it is doing, and leave no incomplete file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

#: A program that is stopped while it writes a folder. Its watchdog is quick, to keep the test short.
PROGRAM = """
import ctypes, signal, sys, threading, time
from pathlib import Path
from ingle import stopping
from ingle.atomic import atomic_file, atomic_folder

stopping.GRACE_S = 30.0 if sys.argv[1] in ("python", "twice") else 0.5
stopping.install()

def ready():
    print("ready", flush=True)

def python():
    ready()
    time.sleep(60)

def compiled():  # like a long kernel: Python's handler cannot run
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ready()
    ctypes.CDLL(None).sleep(60)

def swallowed():
    try:
        python()
    except KeyboardInterrupt:
        time.sleep(60)

def twice():
    with stopping.deferred():
        ready()
        while stopping.requested() is None:
            time.sleep(0.01)
        time.sleep(0.6)  # signals within half a second count as one
        ready()
        time.sleep(60)

def late():  # finishes while the watchdog cleans up
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    cleaning = threading.Event()
    with stopping.on_forced_exit(lambda: (cleaning.set(), time.sleep(0.3))), atomic_file(Path("late")) as file:
        file.write(b"complete, but too late")
        ready()
        cleaning.wait()

def handled():
    with stopping.handled_by_program():
        try:
            python()
        except KeyboardInterrupt:
            time.sleep(1)  # the watchdog would have ended it by now
            sys.exit(7)

try:
    with atomic_folder(Path("out")) as partial:
        (partial / "half").write_text("x")
        globals()[sys.argv[1]]()
except KeyboardInterrupt:
    print("Interrupted: " + stopping.explanation(), file=sys.stderr)
    sys.exit(stopping.EXIT_CODE)
"""


def stop(phase: str, folder: Path, *numbers: signal.Signals) -> tuple[int, str]:
    """Runs the program, sends each signal when it is ready; returns its exit code and standard error."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, phase]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for number in numbers:
                assert process.stdout.readline() == "ready\n"
                time.sleep(0.05)  # into the call that follows
                process.send_signal(number)
            _, stderr = process.communicate(timeout=25)
        finally:
            process.kill()
    return process.returncode, stderr


@pytest.mark.parametrize("phase", ["python", "compiled", "swallowed", "late"])
def test_every_phase_ends_and_leaves_nothing(tmp_path: Path, phase: str) -> None:
    assert stop(phase, tmp_path, signal.SIGTERM) == (
        130,
        "Interrupted: Stopped by SIGTERM. No incomplete file is left.\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    code, stderr = stop("twice", tmp_path, signal.SIGINT, signal.SIGINT)
    assert code == 130 and "Stopped by SIGINT" in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_program_may_handle_ctrl_c_itself(tmp_path: Path) -> None:
    assert stop("handled", tmp_path, signal.SIGINT) == (7, "")
