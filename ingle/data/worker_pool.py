"""Tokenizes chunks in several processes, and returns the results in order."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeVar

from ingle import env
from ingle.atomic import remove_partial
from ingle.data.row_encoder import TokenOptions
from ingle.data.row_tokenizer import RowTokenizer
from ingle.data.types import Tokenizer
from ingle.data.worker import Task, receive, run_task, send
from ingle.errors import IngleError
from ingle.outcome import Outcome

Item = TypeVar("Item")


class WorkerPool:
    """Worker processes, which start with the first task.

    Tasks run in this process if there is one processor, or if the tokenizer cannot be sent to another process.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
        num_workers: Number of processes; by default the number of processors.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions, num_workers: int | None = None) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._count = env.num_processors() if num_workers is None else num_workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._tasks: SimpleQueue[tuple[Task, Outcome[Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._rows: RowTokenizer | None = None
        self._targets: dict[int, Path | None] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closed = True
        for process in self._processes:
            process.kill()  # between two tasks, after an error, or after Ctrl-C
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()
            if (target := self._targets.get(process.pid)) is not None:
                remove_partial(target, process.pid)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()

    def map(self, items: Iterable[tuple[Item, Task | None]]) -> Iterator[tuple[Item, Any]]:
        """Yields each item with the result of its task, in order; no task has the result None.

        Raises the error of the first task that fails. If ``items`` fails, the results before come first.
        """
        waiting: deque[tuple[Item, Outcome[Any] | None]] = deque()
        failure: Exception | None = None
        iterator = iter(items)
        while True:
            try:
                item, task = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            waiting.append((item, None if task is None else self.submit(task)))
            while waiting and (len(waiting) > 2 * self._count or _is_done(waiting[0][1])):
                yield _take(waiting)
        while waiting:
            yield _take(waiting)
        if failure is not None:
            raise failure

    def submit(self, task: Task) -> Outcome[Any]:
        """Starts a task as soon as a process is free."""
        if not self._threads and self._rows is None:
            self._start()
        outcome: Outcome[Any] = Outcome()
        if self._threads:
            self._tasks.put((task, outcome))
            return outcome
        assert self._rows is not None, "the pool was started"
        try:
            outcome.set(run_task(self._rows, task))
        except Exception as error:
            self._rows.close()
            outcome.set(None, error)
        return outcome

    def _start(self) -> None:
        try:
            first = pickle.dumps((self._tokenizer, self._options))
            pickle.loads(first)
        except Exception:  # a tokenizer with code of its own may raise anything
            first = b""
        if self._count == 1 or not first:
            self._rows = RowTokenizer(self._tokenizer, self._options, with_keys=True)
            return
        for _ in range(self._count):
            process = subprocess.Popen(
                [sys.executable, "-c", "from ingle.data.worker import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env.worker_environment(),
                process_group=0,  # Ctrl-C stops this process, which then ends its workers
            )
            self._processes.append(process)
        for process in self._processes:
            thread = threading.Thread(target=self._serve, args=(process,), name="ingle-tokenize", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Lets a process run tasks until the pool is closed; one thread per process."""
        _send_first(process, self._tokenizer, self._options)
        while (item := self._tasks.get()) is not None and not self._is_closed:
            task, outcome = item
            try:
                outcome.set(self._run(process, task))
            except Exception as error:
                outcome.set(None, error)

    def _run(self, process: subprocess.Popen[bytes], task: Task) -> Any:
        self._targets[process.pid] = task.target
        try:
            send(_pipe(process.stdin), task)
            result = receive(_pipe(process.stdout))
        except (EOFError, BrokenPipeError):
            status = process.wait()
            raise IngleError(
                "A process that tokenizes rows ended unexpectedly.",
                where=task.chunk.first,
                why=f"signal {-status}, perhaps because memory is full" if status < 0 else f"exit status {status}",
                fix="repeat the command, which goes on with the rows that are left",
            ) from None
        if isinstance(result, Exception):
            raise result
        return result


def _send_first(process: subprocess.Popen[bytes], tokenizer: Tokenizer, options: TokenOptions) -> None:
    with suppress(BrokenPipeError):  # its first task explains
        send(_pipe(process.stdin), (tokenizer, options))


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "both pipes were requested"
    return pipe


def _is_done(outcome: Outcome[Any] | None) -> bool:
    return outcome is None or outcome.is_done()


def _take(waiting: deque[tuple[Item, Outcome[Any] | None]]) -> tuple[Item, Any]:
    item, outcome = waiting.popleft()
    return item, None if outcome is None else outcome.take()
