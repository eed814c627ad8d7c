"""A result that another thread delivers."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Outcome(Generic[T]):
    """The result of a task, or its error, once it is there.

    The queue does all locking in C. Ctrl-C raises an exception in the main thread at any point of Python code; in the
    locks of ``concurrent.futures`` it can leave a lock taken, and the pool would then wait forever.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def set(self, result: T | None, error: BaseException | None = None) -> None:
        """Stores the result or the error."""
        self._queue.put((result, error))

    def is_done(self) -> bool:
        """Returns whether the result or the error is there."""
        return not self._queue.empty()

    def take(self) -> T:
        """Waits for the result and returns it, or raises the error; called once."""
        result, error = self._queue.get()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
