"""Generates the reference pages from the code: ``python -m docs.generate``.

``docs.check`` fails if a page in the tree differs from what this module writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer.main

from docs import layers
from ingle import errors, events
from ingle.cli.app import app
from ingle.config.base import base_sections, format_name
from ingle.config.data import Source
from ingle.config.evaluate import MetricName, TaskConfig
from ingle.config.run import Run
from ingle.config.schema import Option, options, shapes
from ingle.planning.model_types import model_table
from ingle.report.model_types import COLUMNS, cells

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `make docs` from the code; change the docstrings instead. -->"

#: Row length for ``bits_per_weight`` on the formats page: that of a common 7B model.
IN_FEATURES = 4096

EXIT_CODES = (
    ("0", "Done, or nothing left to do."),
    ("1", "A bug in Ingle: please report the traceback."),
    ("2", "An error that you can fix: the message says where, why and what to type instead."),
    (
        "130",
        "Interrupted by Ctrl-C or SIGTERM; no incomplete file is left, and a run resumes from its last checkpoint.",
    ),
)


def pages() -> dict[str, str]:
    """Returns the text of every generated page by file name."""
    return {
        "config.md": config_page(),
        "cli.md": cli_page(),
        "errors.md": errors_page(),
        "formats.md": formats_page(),
        "metrics.md": metrics_page(),
        "models.md": models_page(),
        "events.md": events_page(),
        "layers.md": layers_page(),
        "layers.svg": layers.picture(),
    }


def layers_page() -> str:
    """Returns the page of all packages and the layers that restrict their imports."""
    lines = _head(
        "Layers",
        "A package only imports from layers below its own, which have higher numbers. Import-linter checks this in "
        "`make check`. A package with a star loads torch; the others load quickly.",
    )
    lines += ["![The layers as boxes, one row for each](layers.svg)", ""]
    return _page([*lines, *_table(("layer", "package", "what it does"), layers.table())])


def config_page() -> str:
    """Returns the page of all config options, by section."""
    found = options()
    lines = _head(
        "Config options",
        "A config file is YAML with these options. On the command line each is `--PATH=VALUE`, with the value "
        "written as in YAML. `ingle config show CONFIG` prints what a file resolves to and where each value "
        "comes from; `ingle config schema` prints the JSON Schema.",
    )
    top = [option for option in found if "." not in option.path]
    lines += _table(("option", "value", "default", "meaning"), (_option_row(option) for option in top))
    for name in shapes(Run):
        inside = [option for option in found if option.path.startswith(name + ".")]
        if not inside:
            continue
        lines += ["", f"## {name}", ""]
        for condition in dict.fromkeys(option.when for option in inside):
            if condition is not None:
                lines += ["", f"### {condition}", ""]
            rows = (_option_row(option) for option in inside if option.when == condition)
            lines += _table(("option", "value", "default", "meaning"), rows)
    return _page(lines)


def _option_row(option: Option) -> tuple[str, ...]:
    default = "required" if option.default is None else f"`{option.default}`"
    return f"`{option.path}`", option.type, default, _markdown(option.description)


def cli_page() -> str:
    """Returns the page of all commands with their arguments and options."""
    lines = _head("Commands", "`ingle COMMAND --help` shows the same in the terminal.")
    for path, command in commands():
        lines += ["", f"## {path}", "", _markdown(inspect.cleandoc(command.help or "")), ""]
        rows = []
        for parameter in command.params:
            name = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
            if parameter.param_type_name == "argument":
                name = f"`{parameter.metavar or parameter.name.upper()}`"
            elif parameter.metavar:
                name = f"`{parameter.opts[0]} {parameter.metavar}`"
            rows.append((name, _parameter_default(parameter), _markdown(getattr(parameter, "help", None) or "")))
        lines += _table(("option", "default", "meaning"), rows)
    lines += ["", "## Exit codes", ""]
    lines += _table(("code", "meaning"), ((f"`{code}`", meaning) for code, meaning in EXIT_CODES))
    return _page(lines)


def commands() -> Iterator[tuple[str, Any]]:
    """Yields every command, as ``("ingle data inspect", command)``."""

    def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield path, command
            return
        for name, sub in inner.items():
            if not sub.hidden:
                yield from walk(f"{path} {name}", sub)

    yield from walk("ingle", typer.main.get_command(app))


def _parameter_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or isinstance(default, bool) or default == () or callable(default):
        return ""
    return f"`{default}`"


def errors_page() -> str:
    """Returns the page of all errors that a user can cause and fix."""
    lines = _head(
        "Errors",
        "Every error that you can fix is one of these. The command line prints it without a traceback and "
        "exits with 2; Python code catches `ingle.errors.IngleError` or a subclass. `Interrupted` is not a mistake. "
        "`str(error)` is the full text; the parts are in `message`, `where`, `why` and `fix`.",
    )
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.Explained)]
    kinds.remove(errors.Explained)
    rows = []
    for kind in kinds:
        parent = f"`{kind.__mro__[1].__name__}`" if issubclass(kind.__mro__[1], errors.IngleError) else ""
        rows.append((f"`{kind.__name__}`", parent, _markdown(_summary(kind))))
    return _page(lines + _table(("error", "subclass of", "meaning"), rows))


def formats_page() -> str:
    """Returns the page of all base formats."""
    lines = _head(
        "Base formats",
        "`base.format` is the format of the frozen weights of linear layers. Norms keep the compute dtype, and so do "
        "the embedding and the output head, unless the model is a GGUF file with quantized ones. Bits include the "
        f"scales and are for rows of {IN_FEATURES:,} weights.",
    )
    rows = []
    for section in base_sections():
        name = format_name(section)
        base = section.model_validate({"format": name})
        bits = f"{base.bits_per_weight(IN_FEATURES):.3f}".rstrip("0").rstrip(".")
        rows.append((f"`{name}`", bits, _markdown(_summary(section)), _markdown(_source(section))))
    lines += _table(("format", "bits per weight", "description", "source"), rows)
    lines += ["", "The options of each format are in [Config options](config.md#base)."]
    return _page(lines)


def models_page() -> str:
    """Returns the page of all types of models."""
    table = model_table()
    trained = sum(entry.is_trained for entry in table.types)
    lines = _head(
        "Types of models",
        f"Of the {len(table.types)} language models of transformers {table.transformers}, {trained} are trained. Each "
        "is tried with a tiny copy: several documents in a batch must give the results that each gives alone. "
        "`ingle models` prints this table, and `ingle models FOLDER` tries a model with its own options.",
    )
    lines += [
        "- *packed*: all documents in one row, nothing is padded.",
        "- *documents*: the same, but the named modules see documents as the rows of batches, grouped by length.",
        "- *rows*: one document per row, with padding, grouped by length. *equal rows*: without padding, in a call for "
        "each length.",
        "",
    ]
    return _page([*lines, *_table(COLUMNS, map(cells, table.types))])


def metrics_page() -> str:
    """Returns the page of all metrics."""
    from ingle.evaluation.scorers import make_scorer

    lines = _head(
        "Metrics",
        "`evaluate.metrics` names what a task computes; the first is the headline. `report.json` gives for each "
        "the score of `base` and of `tuned`, their difference `delta` on the same samples, its 95 % interval "
        "`ci95`, the p-value `p` and the number of samples `n`.",
    )
    rows = []
    for name in get_args(MetricName):
        scorer = make_scorer(name, TaskConfig(sources=(Source(path="x"),), metrics=(name,)))
        metric = scorer.metric
        better = "higher" if metric.higher_is_better else "lower"
        bounds = f"{metric.low:g} to {metric.high:g}".replace("inf", "∞")
        rows.append((f"`{name}`", better, bounds, metric.kind, _markdown(_summary(scorer)), _markdown(_source(scorer))))
    lines += _table(("metric", "better", "range", "kind", "description", "source"), rows)
    return _page([*lines, "", "The kind decides which test and interval a metric gets:", "", *_procedures()])


def _procedures() -> list[str]:
    """Returns the table of tests and intervals, from a docstring."""
    from ingle.evaluation.statistics import procedures

    text = inspect.cleandoc(procedures.__doc__ or "")
    entries = [line.strip("* ").split(": ", 1) for line in text.replace("\n  ", " ").splitlines() if line[:1] == "*"]
    return _table(("kind", "test and interval"), ((f"`{kind}`", _markdown(meaning)) for kind, meaning in entries))


def events_page() -> str:
    """Returns the page of all events that a run sends to its sinks."""
    lines = _head(
        "Events",
        "A run calls `sink(event)` with these events; the terminal, `metrics.jsonl`, the report and the trackers are "
        "sinks. A line of `metrics.jsonl` is one `Step`; its `metrics` are on the same level as its other keys. A line "
        "of `events.jsonl` is any event, with its tag under `event`; `ingle.events.from_dict` reads it back.",
    )
    for event in get_args(events.Event):
        _, described = _attributes(event)
        lines += ["", f"## {event.__name__}", "", f"`{event.tag}`: {_markdown(_summary(event))}", ""]
        rows = (
            (f"`{field.name}`", f"`{field.type}`", _markdown(described.get(field.name, "")))
            for field in dataclasses.fields(event)
        )
        lines += _table(("field", "type", "meaning"), rows)
    return _page(lines)


def _attributes(documented: Any) -> tuple[str, dict[str, str]]:
    text = inspect.cleandoc(documented.__doc__ or "")
    match = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", match[1], re.MULTILINE) if match else []
    return text, {name: " ".join(body.split()) for name, body in entries}


def _summary(documented: Any) -> str:
    return " ".join(inspect.cleandoc(documented.__doc__ or "").split("\n\n")[0].split())


def _source(documented: Any) -> str:
    match = re.search(r"Source: (.+?)(?:\n\s*\n|\Z)", inspect.cleandoc(documented.__doc__ or ""), re.DOTALL)
    return " ".join(match[1].split()).rstrip(".") if match else ""


def _markdown(text: str) -> str:
    """Returns the reST of a docstring as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = text.replace("``", "`")
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _head(title: str, text: str) -> list[str]:
    return [f"# {title}", "", NOTE, "", text, ""]


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return []
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells]]


def _page(lines: list[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> None:
    """Writes all pages."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)
        print(f"wrote docs/reference/{name}")


if __name__ == "__main__":
    main()
