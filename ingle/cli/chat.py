"""``ingle chat``: a conversation, line by line, from a terminal or a script.

Conversations are private: they stay in memory, and only ``/save`` writes a file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ingle import stopping
from ingle.cli.generation import (
    AllowMismatch,
    BaseOnly,
    MaxNewTokens,
    Model,
    Seed,
    Stop,
    System,
    Temperature,
    TopP,
    check_sampling,
    check_template,
    check_text,
)
from ingle.errors import ConfigError, DataError, IngleError
from ingle.wording import nearest

if TYPE_CHECKING:
    from ingle.data.types import Message
    from ingle.inference import Engine

_COMMANDS = {
    "/help": "Show this list.",
    "/system [TEXT]": "Show or set the system message; `/system -` removes it.",
    "/retry": "Answer the last message again.",
    "/save FILE": "Write the conversation to a new file, as a row of training data.",
    "/clear": "Start a new conversation; the system message stays.",
    "/exit": "Leave, like Ctrl-D.",
}
_HELP = (
    'A message of several lines starts and ends with """.\n'
    "Ctrl-C stops an answer or clears the line; the conversation stays."
)
#: Does not match paths and lines that start with a space, which are messages.
_COMMAND = re.compile(r"/(?P<name>[a-z]+)(?:\s+(?P<rest>.*))?$", re.DOTALL)
_QUOTES = '"""'


def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    base_only: BaseOnly = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Chat with a model or with the result of a run.

    `/help` lists the commands: `/system`, `/retry`, `/save`, `/clear`, `/exit`. Ctrl-C stops an answer and keeps the
    conversation; Ctrl-D leaves. From a pipe or a file, each line is a message or a command.
    """
    from ingle.config.model_names import check_name

    check_sampling(temperature, top_p, stop)
    check_text(system or "", "--system")
    check_name(model)
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    notes = make_console(stderr=True)
    with Terminal(notes) as terminal:
        from ingle import inference

        engine = inference.open_model(model, base_only=base_only, allow_mismatch=allow_mismatch, sink=terminal)
    check_template(engine)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": stop or (),
    }
    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
        _print_banner(notes, model, engine, options, base_only)
    with stopping.handled_by_program() if interactive else nullcontext():
        Conversation(engine, system, seed, options, interactive=interactive, notes=notes).run()


class Conversation:
    """A conversation and its commands.

    An error ends a script. On a terminal it is printed, and the conversation continues unchanged.

    Args:
        engine: Generates the answers.
        system: The initial system message.
        seed: Seed of the sampling; each answer adds one to it, so that a repeated question can get a new answer.
        options: Options of :meth:`ingle.inference.Engine.stream`.
        interactive: Whether the input is a terminal.
        notes: Console for everything except the answers.
        read: Reads a line; raises ``EOFError`` at the end of the input and ``KeyboardInterrupt`` at Ctrl-C.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None,
        seed: int,
        options: dict[str, Any],
        *,
        interactive: bool,
        notes: Console,
        read: Callable[[str], str] = input,
    ) -> None:
        self._engine = engine
        self._system = system
        self._seed = seed
        self._options = options
        self._interactive = interactive
        self._notes = notes
        self._read = read
        self._messages: tuple[Message, ...] = ()
        self._last_prompt: tuple[Message, ...] = ()
        self._num_answers = 0
        self._saved: set[Path] = set()

    def run(self) -> None:
        """Reads and handles lines until ``/exit`` or the end of the input."""
        running = True
        while running:
            try:
                running = self._handle_line()
            except EOFError:
                if self._interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not self._interactive or stopping.requested() is not None:  # SIGTERM ends the process
                    raise
                self._note("\nCtrl-D or /exit leaves.")
            except IngleError as error:
                if not self._interactive:
                    raise
                self._note(str(error), style="yellow")

    def _handle_line(self) -> bool:
        """Reads and handles a line; returns False if it is ``/exit``."""
        line = self._read_line("> ")
        if line.lstrip().startswith(_QUOTES):
            self._send(self._read_block(line.lstrip().removeprefix(_QUOTES)))
        elif command := _COMMAND.match(line):
            return self._run_command(command["name"], (command["rest"] or "").strip())
        else:
            self._send(line.strip())
        return True

    def _read_block(self, text: str) -> str:
        while not text.rstrip().endswith(_QUOTES):
            try:
                text += "\n" + self._read_line("... ")
            except EOFError:
                raise ConfigError(f"A message that starts with {_QUOTES} must end with {_QUOTES}.") from None
        return text.rstrip().removesuffix(_QUOTES).strip()

    def _read_line(self, prompt: str) -> str:
        try:
            return self._read(prompt if self._interactive else "")
        except UnicodeDecodeError as error:
            raise DataError("The text is not UTF-8.", where="standard input", why=str(error)) from None

    def _run_command(self, name: str, rest: str) -> bool:
        match name:
            case "help":
                width = max(map(len, _COMMANDS))
                commands = "\n".join(f"{command:<{width}}  {text}" for command, text in _COMMANDS.items())
                self._note(f"{commands}\n{_HELP}")
            case "system":
                self._set_system(rest)
            case "retry":
                if not self._last_prompt:
                    raise ConfigError("There is no message to answer again.")
                self._answer(self._last_prompt)
            case "save":
                self._save(rest)
            case "clear" | "reset":
                self._messages = self._last_prompt = ()
                if self._interactive:
                    self._note("Started a new conversation.")
            case "exit" | "quit":
                return False
            case _:
                close = nearest(f"/{name}", [command.split()[0] for command in _COMMANDS])
                raise ConfigError(
                    f"There is no command /{name}.",
                    fix=(f"did you mean {close}? " if close else "see /help. ")
                    + "To send this as a message, put a space in front of the slash",
                )
        return True

    def _set_system(self, text: str) -> None:
        check_text(text, "/system")
        if text:
            self._system = None if text == "-" else text
        if self._interactive:
            self._note(f"System message: {self._system}" if self._system else "There is no system message.")

    def _send(self, text: str) -> None:
        from ingle.data.types import Message

        check_text(text, "standard input")
        if text:
            self._answer((*self._messages, Message("user", text)))

    def _answer(self, prompt: tuple[Message, ...]) -> None:
        """Prints an answer while it is generated, and adds it to the conversation."""
        from ingle.data.types import Message

        self._last_prompt = prompt
        self._num_answers += 1
        seed = self._seed + self._num_answers
        pieces: list[str] = []
        answer = None
        stopped = False
        try:
            stream = self._engine.stream(prompt, system=self._system, seed=seed, **self._options)
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    answer = end.value
                    break
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self._interactive or stopping.requested() is not None:
                raise
            stopped = True
        text = "".join(pieces)
        if text or not stopped:
            self._messages = (*prompt, Message("assistant", text))
            print()
        if self._interactive:
            self._note(self._ending(text, answer, stopped))

    def _ending(self, text: str, answer: Any, stopped: bool) -> str:
        """Returns a note on how the answer ended, and an empty line."""
        if stopped:
            return "[stopped]\n" if text else "\n[stopped before the first word; /retry tries again]\n"
        if answer is not None and answer.finish_reason == "length":
            if len(answer.token_ids) < self._options["max_new_tokens"]:
                return "[truncated: the context of the model is full; use /clear]\n"
            return f"[truncated after {len(answer.token_ids)} tokens; --max-new-tokens sets the limit]\n"
        return "" if text.strip() else "[empty answer]\n"

    def _save(self, name: str) -> None:
        from ingle.atomic import write_atomically

        path = Path(name).expanduser()
        if not name or not self._messages:
            raise ConfigError(
                "There is nothing to save yet." if name else "/save needs a file name.",
                fix=None if name else "/save chat.jsonl",
            )
        if path.exists() and path not in self._saved:
            raise ConfigError(f"{path} already exists.", fix="give /save the name of a new file")
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = system + [{"role": message.role, "content": message.content} for message in self._messages]
        try:
            write_atomically(path, (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written.", why=error.strerror) from error
        self._saved.add(path)
        self._note(f"Saved {len(messages)} messages to {path}.")

    def _note(self, text: str, style: str = "dim") -> None:
        self._notes.print(Text(text, style=style))


def _edit_lines() -> None:
    """Adds editing and history to ``input``; a pasted text of several lines becomes one message."""
    try:
        import readline
    except ImportError:  # missing in some builds of Python
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


def _print_banner(notes: Console, name: str, engine: Engine, options: dict[str, Any], base_only: bool) -> None:
    rows = []
    if (source := engine.source) is not None:
        model = source.original if base_only and source.original is not None else source.model
        quantized = "" if source.base.format == "none" else f", quantized to {source.base.format}"
        rows.append(("model", f"{model.id}{quantized}"))
        if source.original is not None:
            tuning = f"full fine-tuning of {source.original.id}"
            rows.append(("training", "not used (--base-only)" if base_only else tuning))
        elif source.adapter is not None:
            rows.append(("adapter", "not used (--base-only)" if base_only else str(source.adapter)))
    rows.append(("answers", f"at most {options['max_new_tokens']:,} tokens, temperature {options['temperature']:g}"))
    notes.print(Text(f"Chat with {name}", style="bold"), soft_wrap=True)
    for label, text in rows:
        notes.print(Text(f"  {label:<8} {text}"), soft_wrap=True)
    notes.print(Text("/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves.\n", style="dim"), soft_wrap=True)
