"""``ingle generate``, its prompts, and the options that it shares with ``ingle chat``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingle.errors import ConfigError, DataError, ModelError
from ingle.events import Progress

if TYPE_CHECKING:
    from ingle.inference import Engine

#: A text, or a conversation as pairs of role and content.
Prompt = str | list[tuple[str, str]]

_GIVE_PROMPT = 'use --prompt "...", --prompt-file FILE, or text on standard input'

Model = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="A run folder, an adapter folder, a model folder or a hub id.")
]
System = Annotated[str | None, typer.Option(help="System message for conversations that have none.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=1_048_576, help="Maximum length of an answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=100.0, help="Sampling temperature; 0 is greedy decoding.")]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Sample only from the most likely tokens, whose probabilities add up to this value."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Sampling seed.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Can be repeated.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Apply the adapter to a different base than the one it was trained on.")
]
BaseOnly = Annotated[
    bool, typer.Option("--base-only", help="Use the base model: without the adapter, or before full fine-tuning.")
]


def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to answer. Can be repeated.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `prompt` or `messages`, or text with one prompt per line."),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of answers generated together.")] = 32,
    base_only: BaseOnly = False,
    allow_mismatch: AllowMismatch = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
) -> None:
    """Answer prompts with a model or with the result of a run.

    Without `--prompt` and `--prompt-file`, standard input is the prompt.
    """
    from ingle.config.model_names import check_name

    check_sampling(temperature, top_p, stop)
    check_text(system or "", "--system")
    check_name(model)
    prompts = read_prompts(prompt or [], prompt_file, raw=raw)
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle import inference

        engine = inference.open_model(model, base_only=base_only, allow_mismatch=allow_mismatch, sink=terminal)
        answers = engine.generate(
            [_to_messages(engine, text, raw) for text in prompts],
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            batch_size=batch_size,
            on_progress=lambda done, total: terminal(Progress("Generating", done, total)) if total > 1 else None,
        )
    for index, (question, answer) in enumerate(zip(prompts, answers, strict=True)):
        if as_json:
            print(json.dumps(_record(question, answer), ensure_ascii=False))
        elif len(prompts) == 1:
            print(answer.text)
        else:
            print(f"--- {index + 1}\n{answer.text}")


def _record(prompt: Prompt, answer: Any) -> dict[str, Any]:
    question: dict[str, Any] = (
        {"prompt": prompt}
        if isinstance(prompt, str)
        else {"messages": [{"role": role, "content": content} for role, content in prompt]}
    )
    return question | {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": len(answer.token_ids),
    }


def _to_messages(engine: Engine, prompt: Prompt, raw: bool) -> Any:
    from ingle.data.types import Message

    if raw:
        if not isinstance(prompt, str):
            raise ConfigError("--raw cannot be used with prompts that contain messages.", fix="remove --raw")
        return prompt
    if engine.reads_sources and isinstance(prompt, str):
        return prompt
    check_template(engine)
    pairs = [("user", prompt)] if isinstance(prompt, str) else prompt
    return tuple(Message(role, content) for role, content in pairs)


def check_template(engine: Engine) -> None:
    """Raises if the model has no chat template."""
    if not engine.tokenizer.chat_template:
        raise ModelError(
            "The model has no chat template, which conversations need.",
            fix="use `ingle generate --raw` to continue a text",
        )


def check_sampling(temperature: float, top_p: float, stop: list[str] | None) -> None:
    """Raises for invalid combinations of sampling options, before anything is loaded."""
    if not top_p > 0:
        raise ConfigError("--top-p must be above 0.", where=f"--top-p {top_p}", fix="--top-p 0.9")
    if top_p < 1 and temperature == 0:
        raise ConfigError(
            "--top-p has no effect: decoding at temperature 0 is greedy.",
            where=f"--top-p {top_p}",
            fix="--temperature 0.7",
        )
    if "" in (stop or ()):
        raise ConfigError("An empty --stop would end every answer before its first token.", where="--stop")


def read_prompts(texts: Sequence[str], file: Path | None, *, raw: bool = False) -> list[Prompt]:
    """Returns the prompts of a command.

    Args:
        texts: Values of ``--prompt``.
        file: Value of ``--prompt-file``: JSON lines with a text, ``{"prompt": ...}`` or ``{"messages": [...]}``, or
            text with one prompt per line. Without texts and file, standard input is one prompt.
        raw: Whether the model continues the prompts as they are; white space is then a valid prompt.

    Raises:
        DataError: There is no prompt, or a prompt is empty or cannot be read.
    """
    found: list[tuple[Prompt, str]] = []
    for number, text in enumerate(texts, 1):
        found.append((text, f"--prompt {number} of {len(texts)}" if len(texts) > 1 else "--prompt"))
    if file is not None:
        found.extend(_read_file(file))
    if not texts and file is None:
        if sys.stdin.isatty():
            raise DataError("There is no prompt.", fix=_GIVE_PROMPT)
        found = [(_read_standard_input(), "standard input")]
    if not found:
        raise DataError("There is no prompt.", where=str(file), fix="write one prompt per line")
    for prompt, where in found:
        parts = [prompt] if isinstance(prompt, str) else [content for _, content in prompt]
        if not (parts[-1] if raw else parts[-1].strip()):
            raise DataError("A prompt is empty.", where=where, fix="write at least one word, or remove it")
        for part in parts:
            check_text(part, where)
    return [prompt for prompt, _ in found]


def check_text(text: str, where: str) -> None:
    """Raises for lone surrogates, which no tokenizer accepts.

    They come from command-line bytes that are not UTF-8, or from escapes in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("This text is not valid Unicode.", where=where, why=str(error)) from None


def _read_standard_input() -> str:
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError("The text is not UTF-8.", where="standard input", why=str(error)) from None
    if not text:
        raise DataError("There is no prompt.", where="standard input", fix=_GIVE_PROMPT)
    return text


def _read_file(file: Path) -> Iterator[tuple[Prompt, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would split at U+2028 in JSON strings
    except FileNotFoundError:
        from ingle.config.model_names import nearest_path

        near = nearest_path(file)
        raise DataError(
            "The prompt file does not exist.", where=str(file), fix=f"did you mean {near}?" if near else None
        ) from None
    except IsADirectoryError:
        raise DataError("The prompt file is a folder.", where=str(file), fix="name a file in it") from None
    except UnicodeDecodeError as error:
        raise DataError("The prompt file is not UTF-8 text.", where=str(file), why=str(error)) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}:{number}"
            yield _read_row(line, where) if file.suffix in (".jsonl", ".json") else line, where


def _read_row(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        fix = "write one JSON value per line"
        raise DataError("This line is not JSON.", where=where, why=str(error), fix=fix) from None
    match row:
        case str():
            return row
        case {"prompt": str(text)}:
            return text
        case {"messages": [*messages]} if messages:
            return _read_messages(messages, where)
    raise DataError(
        "This line contains no prompt.",
        where=where,
        fix='{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    )


def _read_messages(messages: list[Any], where: str) -> list[tuple[str, str]]:
    """Returns the messages without the final answer, so that rows of a dataset can be used as prompts."""
    read: list[tuple[str, str]] = []
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)}:
                read.append((role, content))
            case _:
                raise DataError("A message needs a role and a content.", where=where)
    while read and read[-1][0] == "assistant":
        read.pop()
    if not read:
        raise DataError("The conversation has no message to answer.", where=where)
    return read
