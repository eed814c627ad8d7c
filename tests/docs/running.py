"""Runs the commands of a page: ``ingle`` with fewer steps and in one process, other programs where possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.commands import shown_commands
from docs.markdown import Block, Page

#: Programs that read files of the page.
_READERS = ("cat", "cp", "head", "ls", "tail")


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        code: The exit code.
        output: What it printed.
    """

    code: int
    output: str


class Worker:
    """A process in which commands of ``ingle`` and Python programs run.

    Args:
        root: The repository.
        environment: Variables added to those of this process.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root), "TERM": "dumb"} | environment,
        )

    def run(self, words: Sequence[str], folder: Path) -> Result:
        """Runs ``ingle`` with the arguments ``words`` in a folder."""
        return self._ask({"words": list(words), "folder": str(folder)})

    def run_python(self, text: str, folder: Path) -> Result:
        """Runs a Python program in a folder."""
        return self._ask({"python": text, "folder": str(folder)})

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        """Stops the process."""
        self._process.communicate(timeout=60)
        self._printed.close()

    def _ask(self, request: dict[str, Any]) -> Result:
        assert self._process.stdin is not None and self._process.stdout is not None
        begin = self._printed.seek(0, os.SEEK_END)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        self._printed.seek(begin)
        output = self._printed.read()
        assert answer, f"the process ended with {self._process.wait()} in {request}\n{output}"
        return Result(int(answer), output)


def shorten(words: Sequence[str], folder: Path) -> list[str]:
    """Returns the words of an ``ingle`` command with fewer steps, samples and tokens."""
    command, short = words[0], list(words)
    config = "".join((folder / word).read_text() for word in words if word.endswith(".yaml"))
    if command == "train" and "--resume" not in words:
        short += ["--train.num_steps=2", "--train.global_batch_size=1", "--optim.warmup_steps=0"]
        if "evaluate:" in config or any(word.startswith("--evaluate") for word in words):
            short += ["--evaluate.num_samples=2", "--evaluate.max_new_tokens=4"]
    elif command == "evaluate":
        short += ["--num_samples=2", "--max_new_tokens=4"]
    elif command == "generate":
        short += ["--max-new-tokens", "4"]
    elif command == "formats":
        short += ["--tokens", "64"] + (["--formats", "q8_0,q4_k_m"] if "--formats" not in words else [])
    elif command == "quantize" and "--data" in words:
        short += ["--tokens", "64"]
    return short


@dataclass(frozen=True)
class Runner:
    """Runs pages.

    Attributes:
        worker: Runs ``ingle``.
        root: The repository.
        verifies: Whether llama-cpp-python is installed, so that ``--verify`` works for GGUF.
    """

    worker: Worker
    root: Path
    verifies: bool

    def run_page(self, page: Page, folder: Path) -> Iterator[str]:
        """Writes the files of a page and runs its commands and programs in ``folder``, in order.

        Yields:
            The place and output of everything that does not exit with 0.
        """
        for block in page.blocks:
            if name := block.mark("file"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(block.text)
            if block.language == "python" and "run" in block.marks:
                yield from _failure(self.worker.run_python(block.text, folder), block, "this program")
            elif block.language == "console":
                for command in shown_commands(block):
                    yield from _failure(self.run_command(command, folder), block, command)

    def run_command(self, command: str, folder: Path) -> Result:
        """Runs a command line."""
        words = _split(command, folder)
        match Path(words[0]).name:
            case "ingle":
                return self._run_ingle(words[1:], folder)
            case "make":
                return self._run_make(words[1:], folder)
            case "pip":
                return _check_extra(words, self.root)
            case name if name in _READERS:
                if not self.verifies and "certificate" in command:
                    return Result(0, "no certificate without llama-cpp-python")
                done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
                return Result(done.returncode, done.stdout + done.stderr)
            case _:  # the files that another program would serve must exist
                missing = [word for word in words[1:] if _is_path(word) and not (folder / word).exists()]
                return Result(len(missing), f"missing: {missing}")

    def _run_ingle(self, words: Sequence[str], folder: Path) -> Result:
        if not self.verifies and words[0] == "export":
            words = [word for word in words if word != "--verify"]
        return self.worker.run(shorten(words, folder), folder)

    def _run_make(self, targets: Sequence[str], folder: Path) -> Result:
        """Runs the first ``ingle`` command of a target, or checks that the target exists."""
        venv = folder / "venv"  # not our own: make creates and removes it
        asked = ["make", "--dry-run", f"VENV={venv}", f"PYTHON={sys.executable}", *targets]
        done = subprocess.run(asked, cwd=self.root, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines() if done.returncode == 0 else ():
            if line.startswith(f"{venv}/bin/ingle "):
                return self._run_ingle(_split(line, folder)[1:], folder)
        return Result(done.returncode, done.stdout + done.stderr)


def _failure(done: Result, block: Block, command: str) -> Iterator[str]:
    if done.code != 0:
        yield f"{block.where}: {command}\nexit {done.code}\n{done.output}"


def _split(command: str, folder: Path) -> list[str]:
    """Returns the words of a simple command as bash splits them."""
    asked = ["bash", "-euc", f"printf '%s\\0' {command}"]
    return subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def _check_extra(words: Sequence[str], root: Path) -> Result:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [word.partition("[")[2].rstrip("]") for word in words if "[" in word]
    unknown = [name for name in named if name not in extras]
    return Result(len(unknown), f"unknown extras: {unknown}")


def _is_path(word: str) -> bool:
    return "/" in word or word.endswith((".gguf", "Modelfile", ".json"))
