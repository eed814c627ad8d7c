"""Runs a chat template, which is code that comes with a model, within limits.

transformers renders a template in a sandbox that isolates it from the system. This module also limits time, memory and
the size of the output, and its errors name the line of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import jinja2

from ingle.data.compiled_template import ChatRenderer
from ingle.data.quota import OutOfTime, Quota
from ingle.data.types import Message, Tokenizer
from ingle.errors import DataError, ModelError
from ingle.wording import first_line

#: CPU time for all renderings of a conversation of up to 64 messages; common templates need a thousandth of it. Every
#: answer requires a rendering of all messages before it, so the time grows with the square of the number of messages.
TIME_S, _MESSAGES = 3.0, 64
#: Memory for the same.
MEMORY_BYTES = 1 << 29
#: A rendering may be this many times longer than its contents, plus a fixed part.
_GROWTH, _FIXED_CHARS = 16, 1 << 20

_FIX = "correct the template, or use another: --model.chat_template=FILE"


class Sandbox:
    """Limits for the chat template of a tokenizer, and errors that name its file and line.

    As a context manager it prepares the limits once for many conversations, which is faster than for each.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.renderer = ChatRenderer(tokenizer)
        self._quota: Quota | None = None

    def __enter__(self) -> Sandbox:
        self._quota = Quota(MEMORY_BYTES).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._quota is not None, "the sandbox was entered"
        self._quota.__exit__()
        self._quota = None

    @contextmanager
    def limited(self, origin: str | None, num_messages: int) -> Iterator[None]:
        """Limits the block, which renders one conversation.

        Args:
            origin: ``file:line`` of the row, for the error.
            num_messages: Messages of the conversation.

        Raises:
            ModelError: The template takes too much time or memory, or is not valid Jinja.
        """
        if self._quota is None:
            with self, self.limited(origin, num_messages):
                yield
            return
        self._refuse_powers()
        seconds = TIME_S * max(1.0, num_messages / _MESSAGES) ** 2
        try:
            with self._quota.limited(seconds):
                yield
        except OutOfTime as error:
            why = f"it was still running after {seconds:.0f} seconds of CPU time"
            raise self._too_much("time", why, error, origin) from None
        except MemoryError as error:
            raise self._too_much("memory", f"it needs more than {MEMORY_BYTES >> 20} MiB", error, origin) from None
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                "The chat template is not valid Jinja.", where=self._place(error.lineno), why=error.message, fix=_FIX
            ) from None

    def _refuse_powers(self) -> None:
        template = self.tokenizer.chat_template
        for source in template.values() if isinstance(template, dict) else (template,):
            if isinstance(source, str) and (line := _find_power(source)):
                message = "The chat template computes a power, which could run forever."
                raise ModelError(message, where=self._place(line), fix=_FIX)

    def _too_much(self, resource: str, why: str, error: BaseException, origin: str | None) -> ModelError:
        return ModelError(
            f"The chat template takes too much {resource}.",
            where=self._place(_find_line(error.__traceback__)),
            why=why + (f" (for {origin})" if origin else ""),
            fix=_FIX,
        )

    def refusal(self, error: Exception, messages: Sequence[Message], origin: str | None) -> DataError:
        """Returns the error for a conversation that the template cannot render.

        Args:
            error: What the template raised.
            messages: The conversation.
            origin: ``file:line`` of the row.
        """
        roles = ", ".join(message.role for message in messages)
        line = _find_line(error.__traceback__)
        at = f", at {self._place(line)}" if line is not None else ""
        return DataError(
            "The chat template refuses the conversation.",
            where=origin,
            why=f"{first_line(error)} (roles: {roles}){at}",
            fix="correct the row or data.system, or use another template: --model.chat_template=FILE",
        )

    def check_output(self, text: str, messages: Sequence[Message]) -> str:
        """Returns the rendered text if it is valid Unicode of a reasonable length.

        Raises:
            ModelError: It is not.
        """
        try:
            if not text.isascii():  # known without looking at the characters
                text.encode()
        except UnicodeEncodeError as error:
            raise ModelError(
                "The rendered conversation contains half of a surrogate pair, which is not a character.",
                where=self._place(None),
                why=str(error),
                fix="correct the text of the messages, or the template",
            ) from None
        given = sum(len(message.written) for message in messages)
        if len(text) > _FIXED_CHARS + _GROWTH * given:
            raise ModelError(
                "The output of the chat template is too long.",
                where=self._place(None),
                why=f"{len(text):,} characters for a conversation of {given:,}",
                fix=_FIX,
            )
        return text

    def _place(self, line: int | None) -> str:
        """Returns the file and line of the chat template, or the option if no file of the tokenizer contains it."""
        name, joint = self._source
        return name + (f"{joint}{line}" if line is not None else "")

    @cached_property
    def _source(self) -> tuple[str, str]:
        """The source of the template, and the separator between it and a line number."""
        folder = Path(str(getattr(self.tokenizer, "name_or_path", "") or "."))
        if _read_text(folder / "chat_template.jinja") == self.tokenizer.chat_template:
            return str(folder / "chat_template.jinja"), ":"
        if _read_setting(folder / "tokenizer_config.json") == self.tokenizer.chat_template:
            return f"chat_template in {folder / 'tokenizer_config.json'}", ", line "
        return "model.chat_template", ", line "


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _read_setting(file: Path) -> Any:
    try:
        settings = json.loads(_read_text(file) or "null")
    except ValueError:
        return None
    return settings.get("chat_template") if isinstance(settings, dict) else None


def _find_line(trace: TracebackType | None) -> int | None:
    """Returns the line of the template that raised the error."""
    line = None
    while trace is not None:
        code = trace.tb_frame.f_globals
        if "__jinja_template__" in code:  # compiled to Python, with a table of lines
            line = code["__jinja_template__"].get_corresponding_lineno(trace.tb_lineno)
        elif "__jinja_exception__" in code:  # Jinja has already rewritten the frame
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@lru_cache(maxsize=8)
def _find_power(source: str) -> int | None:
    """Returns the line of the first power: ``10 ** 10 ** 10`` is a single instruction, which no signal interrupts.

    The filter ``round`` computes a power from its precision.
    """
    words: list[str] = []
    try:
        for line, kind, text in jinja2.Environment().lex(source):
            if kind in ("whitespace", "comment"):
                continue
            if kind == "operator" and text == "**" and words[-1:] not in (["("], [","]):  # unpacks arguments
                return int(line)
            # A precision of one digit, or none, is harmless.
            if words[-3:] == ["|", "round", "("] and not (text == ")" or re.fullmatch(r"\d", text)):
                return int(line)
            if words[-4:-1] == ["|", "round", "("] and words[-1] != ")" and text != ")":
                return int(line)
            if kind == "string" and text[1:-1] == "round" and words[-2:] == ["map", "("]:
                return int(line)
            words.append(text)
    except jinja2.TemplateSyntaxError:
        return None  # transformers raises the error
    return None
