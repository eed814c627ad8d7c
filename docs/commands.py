"""Checks the code blocks of the Markdown pages.

The language of a block decides how it is checked:

- ``console``: lines that begin with ``$`` are commands, the others are output. Commands, options and dotted config
  paths of ``ingle`` must exist, and so must targets of ``make``. The tests also run the commands of the README, the
  tutorials and the how-tos (``tests/docs/running.py``), each page in a new folder.
- ``python``: must compile; the tests also run ``python run``.
- ``yaml``, ``json``, ``jsonl``: must parse. YAML with a part of a config may only name existing options; YAML with a
  complete config is validated.
- ``file=NAME`` after the language: the block is the content of that file in the page's folder.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from docs import generate
from docs.markdown import Block, Page
from ingle.config.evaluate import TaskConfig
from ingle.config.run import Run
from ingle.config.section import Section
from ingle.errors import IngleError

#: Programs that a page may show besides ``ingle`` and ``make``.
OTHER_PROGRAMS = {
    *("cat", "cd", "cp", "git", "head", "kill", "llama-server", "ls", "ollama", "pip", "python", "tail", "tensorboard")
}


def wrong_blocks(pages: list[Page], root: Path) -> Iterator[str]:
    """Yields the problems of all code blocks."""
    for page in pages:
        for block in page.blocks:
            match block.language:
                case "console":
                    for command in shown_commands(block):
                        yield from (f"{block.where}: {problem}" for problem in wrong_command(command, root))
                case "python":
                    yield from _wrong_python(block)
                case "yaml" | "json" | "jsonl":
                    yield from _wrong_data(block)
                case "bash" | "sh" | "shell":
                    yield f"{block.where}: use a `console` block with `$ ` before each command"
                case _:
                    pass


def shown_commands(block: Block) -> list[str]:
    """Returns the commands of a console block, with continued lines joined."""
    text = re.sub(r"\\\n(?:> ?)?", " ", block.text)
    return [line[2:].strip() for line in text.splitlines() if line.startswith("$ ")]


def wrong_command(command: str, root: Path) -> Iterator[str]:
    """Yields the problems of a command line."""
    for words in _split(command):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if not words:
            continue
        program, arguments = Path(words[0]).name, words[1:]
        if program == "make":
            targets = re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE)
            yield from (f"make has no target {word}" for word in arguments if "=" not in word and word not in targets)
        elif program == "ingle":
            yield from _wrong_ingle(arguments, root)
        elif program not in OTHER_PROGRAMS:
            yield f"{program} is not in the list of programs that pages may show"


def _split(command: str) -> list[list[str]]:
    """Returns the words of each program that a line runs; quoted text stays one word."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word.strip("|&;"):
            parts[-1].append(word)
        else:
            parts.append([])
    return parts


def _wrong_ingle(arguments: list[str], root: Path) -> Iterator[str]:
    known = dict(generate.commands())
    positional = [word for word in arguments if not word.startswith("-")]
    candidates = [" ".join(["ingle", *positional[:count]]) for count in (2, 1)]
    name = next((candidate for candidate in candidates if candidate in known), None)
    if name is None:
        if arguments not in ([], ["--help"], ["--version"], ["-h"]):
            yield f"there is no command `ingle {' '.join(arguments)}`"
        return
    parameters = known[name].params
    flags = {flag for parameter in parameters for flag in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}
    for word in arguments:
        flag = word.split("=")[0]
        if not word.startswith("-") or word == "--" or flag in flags or re.fullmatch(r"-[\d.]+", word):
            continue
        if not takes_overrides(known[name]):
            yield f"`{name}` has no option {flag}"
        elif problem := _unknown_option(flag.removeprefix("--"), TaskConfig if name == "ingle evaluate" else Run):
            yield problem
    for word in positional[len(name.split()) - 1 :]:
        if word.startswith("examples/") and not (root / word).exists():
            yield f"{word} does not exist"


def takes_overrides(command: Any) -> bool:
    """Returns whether a command passes unknown options to the config."""
    return bool((command.context_settings or {}).get("ignore_unknown_options"))


def _unknown_option(path: str, section: type[Section] = Run) -> str | None:
    options = {re.sub(r"\.N\b", ".0", option.path): option for option in generate.options(section)}
    known = {*options, *(name.rpartition(".")[0] for name in options)}
    tables = [name for name, option in options.items() if option.type.startswith("a mapping")]
    if re.sub(r"\.\d+\b", ".0", path) in known or any(path.startswith(f"{table}.") for table in tables):
        return None
    near = difflib.get_close_matches(path, known, n=1)
    return f"there is no option {path}" + (f"; did you mean {near[0]}?" if near else "")


def _wrong_python(block: Block) -> Iterator[str]:
    try:
        compile(block.text, block.where, "exec")
    except SyntaxError as error:
        yield f"{block.where}: {error}"


def _wrong_data(block: Block) -> Iterator[str]:
    texts = block.text.splitlines() if block.language == "jsonl" else [block.text]
    for text in texts:
        try:
            value = yaml.safe_load(text) if block.language == "yaml" else json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            yield f"{block.where}: {error}"
            continue
        if block.language == "yaml" and isinstance(value, dict) and set(value) <= set(Run.model_fields):
            yield from (f"{block.where}: {problem}" for problem in _wrong_config(value))


def _wrong_config(value: dict[str, Any]) -> Iterator[str]:
    from ingle.config.loader import run_from_yaml

    required = {name for name, field in Run.model_fields.items() if field.is_required()}
    if required <= set(value):
        try:
            run_from_yaml(yaml.safe_dump(value))
        except IngleError as error:
            yield str(error)
        return
    for path in _leaves(value):
        if problem := _unknown_option(path):
            yield problem


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}{key}.")
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}{index}.")
    else:
        yield prefix.rstrip(".")
