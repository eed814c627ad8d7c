"""Running a chat template, which is a program that comes with a model, within limits.

transformers runs it in a sandbox that keeps it from reaching anything else.  Here it also gets a limit of time, of
memory and of what it may write, and whatever goes wrong names the line of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import jinja2

from ingle.data.limits import OutOfTime, limited
from ingle.data.types import Message, Tokenizer
from ingle.errors import DataError, ModelError
from ingle.wording import first_line

#: Processor time for all renderings of a conversation of up to 64 messages; common templates need a thousandth of it.
#: Every answer takes a rendering of all that is before it, so longer conversations get the square of it.
TIME_S, _MESSAGES = 3.0, 64
#: Memory for the same.
MEMORY_BYTES = 1 << 29
#: A rendering may be this many times longer than its contents, plus a fixed part.
_GROWTH, _FIXED_CHARS = 16, 1 << 20

_FIX = "correct the template, or name another with model.chat_template="


@contextmanager
def sandboxed(tokenizer: Tokenizer, origin: str | None, num_messages: int = 1) -> Iterator[None]:
    """Limits what the block, which renders conversations, may take.

    Args:
        tokenizer: Whose template is rendered.
        origin: ``file:line`` of the row, for the error.
        num_messages: Messages of the conversation.

    Raises:
        ModelError: The template takes too much time or memory, or is not valid Jinja.
    """
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, dict) else (template,)
    found = next((line for source in sources if isinstance(source, str) and (line := _find_power(source))), None)
    seconds = TIME_S * max(1.0, num_messages / _MESSAGES) ** 2
    if found is not None:
        raise ModelError(
            "The chat template computes a power, which may never end.",
            where=place(tokenizer, found),
            fix=_FIX,
        )
    try:
        with limited(seconds, MEMORY_BYTES):
            yield
    except OutOfTime as error:
        why = f"it was still running after {seconds:.0f} seconds of processor time"
        raise _too_much("time", why, tokenizer, error, origin) from None
    except MemoryError as error:
        why = f"it asked for more than {MEMORY_BYTES >> 20} MiB"
        raise _too_much("memory", why, tokenizer, error, origin) from None
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            "The chat template is not valid Jinja.",
            where=place(tokenizer, error.lineno),
            why=error.message,
            fix=_FIX,
        ) from None


def _too_much(what: str, why: str, tokenizer: Tokenizer, error: BaseException, origin: str | None) -> ModelError:
    return ModelError(
        f"The chat template takes too much {what}.",
        where=place(tokenizer, _find_line(error.__traceback__)),
        why=why + (f" (for {origin})" if origin else ""),
        fix=_FIX,
    )


def refusal(error: Exception, tokenizer: Tokenizer, messages: Sequence[Message], origin: str | None) -> DataError:
    """The error for a conversation that the template cannot render.

    Args:
        error: What the template raised.
        tokenizer: Whose template it is.
        messages: The conversation.
        origin: ``file:line`` of the row.
    """
    roles = ", ".join(message.role for message in messages)
    line = _find_line(error.__traceback__)
    at = f", at {place(tokenizer, line)}" if line is not None else ""
    return DataError(
        "The chat template refuses the conversation.",
        where=origin,
        why=f"{first_line(error)} (roles: {roles}){at}",
        fix="correct the row or data.system, or name another template with model.chat_template=",
    )


def check_size(text: str, tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The rendered text, if its length is reasonable and all of it are characters.

    Raises:
        ModelError: It is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            "The rendered conversation holds half of a surrogate pair, which is no character.",
            where=place(tokenizer, None),
            why=str(error),
            fix="correct the text of the messages, or the template",
        ) from None
    given = sum(len(message.content) for message in messages)
    if len(text) > _FIXED_CHARS + _GROWTH * given:
        raise ModelError(
            "The chat template writes too much.",
            where=place(tokenizer, None),
            why=f"{len(text):,} characters for a conversation of {given:,}",
            fix=_FIX,
        )
    return text


def place(tokenizer: Tokenizer, line: int | None) -> str:
    """The file of a chat template and the line; the option where it comes from no file of the tokenizer."""
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    name = "model.chat_template"
    if _read_text(folder / "chat_template.jinja") == tokenizer.chat_template:
        return f"{folder / 'chat_template.jinja'}" + (f":{line}" if line is not None else "")
    if _read_setting(folder / "tokenizer_config.json") == tokenizer.chat_template:
        name = f"chat_template in {folder / 'tokenizer_config.json'}"
    return name + (f", line {line}" if line is not None else "")


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
    """The line of the template that was being run when an error was raised."""
    line = None
    while trace is not None:
        code = trace.tb_frame.f_globals
        if "__jinja_template__" in code:  # compiled Python, which knows the lines it was made of
            line = code["__jinja_template__"].get_corresponding_lineno(trace.tb_lineno)
        elif "__jinja_exception__" in code:  # a frame that Jinja has already put in place of the compiled one
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@lru_cache(maxsize=8)
def _find_power(source: str) -> int | None:
    """The line of the first power of numbers.  ``10 ** 10 ** 10`` is one instruction that no signal interrupts.

    The filter ``round`` with a precision computes one too.
    """
    words: list[str] = []
    try:
        for line, kind, text in jinja2.Environment().lex(source):
            if kind in ("whitespace", "comment"):
                continue
            if kind == "operator" and text == "**" and words[-1:] not in (["("], [","]):  # there it unpacks arguments
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
        return None  # transformers will say so
    return None
