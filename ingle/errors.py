"""Errors that users can cause and fix.

An error says what is wrong, where (an option or ``file:line``), why (the numbers), and what to type instead.
Programming mistakes raise ``AssertionError``.
"""

from __future__ import annotations

from dataclasses import dataclass


class Explained(BaseException):
    """The base of :class:`IngleError` and :class:`Interrupted`: a message with details for the user.

    Args:
        message: A full sentence that says what is wrong.
        where: The option (``data.max_seq_len``), ``file:line`` or path.
        why: The cause and its numbers.
        fix: What to type or do instead.
    """

    def __init__(
        self, message: str, *, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.message]
        for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if text:
                body = text.replace("\n", "\n         ")
                lines.append(f"  {label:<6} {body}")
        return "\n".join(lines)


#: Exit code by which ranks ask the process that started them to start them again.
RESTART = 75

#: Exit code of ranks that ran out of memory and go on in smaller parts when they are started again.
SMALLER_PARTS = 76


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended, in a form that can be sent to other processes.

    Attributes:
        name: The kind of error, e.g. ``DataError``.
        text: The message with its details; empty if there is nothing to print.
        code: The exit code.
        lost: Whether another rank was missing, so that this error is a consequence.
    """

    name: str
    text: str
    code: int
    lost: bool = False


class Agreed(Exception):
    """Carries the error on which all ranks agreed to the place where rank 0 prints it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class IngleError(Explained, Exception):
    """An error that the user can fix; the command line prints it without a traceback and exits with 2."""


class ConfigError(IngleError):
    """An option is unknown, has an invalid value, or conflicts with another option."""


class DataError(IngleError):
    """A data file is missing, malformed or empty, or has no supervised tokens."""


class ModelError(IngleError):
    """A model or tokenizer cannot be found or read, or is not supported."""


class HubUnavailable(ModelError):
    """A model or dataset is needed from the hub, and the hub cannot be reached."""


class GgufError(ModelError):
    """A .gguf file is damaged, truncated, or has content that Ingle does not support."""


class QuantizationError(IngleError):
    """A weight cannot be quantized to the requested format."""


class AdapterError(IngleError):
    """An adapter matches no module, does not fit its base, or has damaged files."""


class CheckpointError(IngleError):
    """A checkpoint cannot be written or read, or belongs to a different run."""


class ExportError(IngleError):
    """An export would lose too much of the training, or its answers differ from those of the trained model."""


class DoesNotFit(IngleError):
    """The run needs more memory or disk space than is available."""


class OutOfMemory(IngleError):
    """A rank ran out of memory; the run goes on in smaller parts when it is started again."""


class RankLost(IngleError):
    """A process of a run was killed, crashed, or stopped responding."""


class NonFiniteError(IngleError):
    """A loss or gradient became NaN or infinite."""


class ProofFailed(IngleError):
    """A run does not begin where it should: at its initial function, with the known values of its losses."""


class NotTrained(IngleError):
    """A tensor that should be trained has not moved in the first steps."""


class EvaluationError(IngleError):
    """A task, metric or comparison cannot be computed as requested."""


class RewardError(IngleError):
    """A reward function cannot be loaded, or fails for too many answers."""


class DependencyError(IngleError):
    """A required optional library is not installed."""


class Interrupted(Explained):
    """Ctrl-C or SIGTERM ended the command, which exits with 130; a run resumes from its last checkpoint.

    Not an ``Exception``, like ``KeyboardInterrupt``, so that error handlers do not catch it.
    """
