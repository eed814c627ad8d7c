"""The one tree of errors that a user can cause and fix.

Every error says what is wrong in a sentence, where (an option or ``file:line``), why (the numbers) and
what to type instead.  A programmer's mistake is an ``assert``, never one of these.
"""

from __future__ import annotations


class Explained(BaseException):
    """What the user reads when something ends early.

    Args:
        message: One sentence that says what is wrong.
        where: The option (``data.max_seq_len``), ``file:line`` or path it concerns.
        why: The numbers or the cause behind it.
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


class IngleError(Explained, Exception):
    """A mistake of the user; the command line prints it without a traceback and exits with 2."""


class ConfigError(IngleError):
    """An option is unknown, of the wrong type, or at odds with another."""


class DataError(IngleError):
    """A data file is missing, malformed, empty, or leaves nothing to learn from."""


class ModelError(IngleError):
    """A model or tokenizer cannot be found, read, or is of a kind that is not supported."""


class HubUnavailable(ModelError):
    """A hub id was asked for and the hub cannot be reached."""


class GgufError(ModelError):
    """A .gguf file is damaged, cut short, or holds what Ingle does not read."""


class QuantizationError(IngleError):
    """A weight cannot be held in the asked-for format."""


class AdapterError(IngleError):
    """An adapter matches nothing, does not fit its base, or its files are damaged."""


class CheckpointError(IngleError):
    """A checkpoint cannot be written, read back, or belongs to another run."""


class ExportError(IngleError):
    """An export would lose too much of what was trained, or what was written does not answer as it should."""


class DoesNotFit(IngleError):
    """The run needs more memory or disk than there is."""


class NonFiniteError(IngleError):
    """A loss or gradient became NaN or infinite."""


class EvaluationError(IngleError):
    """A task, metric or comparison cannot be computed as asked."""


class DependencyError(IngleError):
    """An optional library is needed and not installed."""


class Interrupted(Explained):
    """Ctrl-C or SIGTERM ended the command, which exits with 130; a run continues from its last checkpoint.

    Like ``KeyboardInterrupt`` it is no ``Exception``, so that code that handles errors does not swallow it.
    """
