"""The command ``ingle predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingle.cli.arguments import check_writable
from ingle.cli.generation import AllowMismatch, Model, check_text
from ingle.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ingle.data import Example
    from ingle.prediction import Predictor

#: Labels of a text on the terminal, unless ``--top-k`` says how many.
_SHOWN_LABELS = 5
#: Longest text of a row on the terminal, in characters.
_SHOWN_CHARS = 60


def predict(
    model: Model,
    text: Annotated[
        list[str] | None, typer.Option(help="A text to classify, to tag or to fill, or a prompt. Can be repeated.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="The second text of a pair, or the answer to a prompt, one for each --text."),
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="A question about --context. Can be repeated.")] = None,
    context: Annotated[str | None, typer.Option(help="The text with the answers to each --question.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Rows to predict, in the layouts of training data (.jsonl, .csv, .conll, ...), or one text per line "
            "(.txt, or - for standard input). Labels may be missing."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Number of labels, answers or fills of a mask for each row."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per row.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one JSON object per row to this file instead.")
    ] = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Predict labels, tags, answers, masked words or the scores of answers with a model that was trained for it.

    - `ingle predict runs/polarity --text "A film of great beauty."`
    - `ingle predict runs/names --file sentences.txt --output tagged.jsonl`
    - `ingle predict runs/answers --question "Who?" --context "Ada wrote it."`
    - `ingle predict bert-base-uncased --text "The [MASK] sleeps."`
    - `ingle predict runs/reward --file pairs.jsonl` (or `--text PROMPT --pair ANSWER`)
    """
    from ingle.config.model_names import check_name

    check_name(model)
    given = _collect(text or [], pair or [], question or [], context)
    if not given and file is None:
        raise DataError(
            "There is nothing to predict.", fix='use --text "...", --question with --context, or --file FILE'
        )
    if given and file is not None:
        raise ConfigError("--file cannot be combined with texts on the command line.", where=f"--file {file}")
    if output is not None:
        check_writable(output, "--output", "predictions.jsonl")
    from ingle import prediction
    from ingle.events import Saved
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    with Terminal(make_console(stderr=True)) as terminal:
        predictor = prediction.open_predictor(model, allow_mismatch=allow_mismatch, sink=terminal)
        records = predictor.predict(_rows(predictor, given, file), top=top_k, sink=terminal)
        with ExitStack() as stack:
            write = _writer(stack, output, as_json=as_json, top=top_k, is_one=file is None and len(given) == 1)
            for record in records:
                write(record)
        if output is not None:
            terminal(Saved(0, str(output), "predictions"))


def _collect(
    texts: list[str], pairs: list[str], questions: list[str], context: str | None
) -> list[tuple[str, dict[str, str]]]:
    """Returns the texts of each row, and the option that they come from.

    Raises:
        ConfigError: A text lacks the one that belongs to it.
        DataError: A text is empty or not valid Unicode.
    """
    if pairs and len(pairs) != len(texts):
        raise ConfigError(
            f"Each --pair belongs to a --text: there are {len(texts)} and {len(pairs)}.", where="--pair, --text"
        )
    if bool(questions) != (context is not None):
        raise ConfigError("A question needs a context.", fix='use --question "..." --context "..."')
    rows = [("--text", {"text": first, "pair": second}) for first, second in zip(texts, pairs, strict=False)]
    rows += [("--text", {"text": text}) for text in texts[len(pairs) :]]
    rows += [("--question", {"question": question, "context": context or ""}) for question in questions]
    numbered = []
    for number, (option, row) in enumerate(rows, 1):
        origin = f"{option} {number} of {len(rows)}" if len(rows) > 1 else option
        for part in row.values():
            check_text(part, origin)
        if not all(part.strip() for part in row.values()):
            raise DataError("A text is empty.", where=origin, fix="write at least one word")
        numbered.append((origin, row))
    return numbered


def _rows(predictor: Predictor, given: list[tuple[str, dict[str, str]]], file: Path | None) -> Iterable[Example]:
    if file == Path("-"):
        return _read_lines(predictor)
    if file is not None:
        return predictor.read(file)
    return [predictor.make_row(texts, origin) for origin, texts in given]


def _read_lines(predictor: Predictor) -> Iterator[Example]:
    """Yields a row for each line of standard input that is not empty.

    Raises:
        DataError: A line is not valid Unicode, or the model reads more than one text.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        if text := line.decode(errors="surrogateescape").strip():
            check_text(text, f"stdin:{number}")
            yield predictor.make_row({"text": text}, f"stdin:{number}")


def _writer(
    stack: ExitStack, output: Path | None, *, as_json: bool, top: int | None, is_one: bool
) -> Callable[[dict[str, Any]], None]:
    """Returns what writes a record: to a file that appears when it is complete, or to standard output."""
    if output is not None:
        from ingle.atomic import atomic_file

        stream = stack.enter_context(atomic_file(output))

        def write(record: dict[str, Any]) -> None:
            stream.write(f"{_as_json(record)}\n".encode())

        return write
    if as_json:
        return lambda record: print(_as_json(record))
    return lambda record: print("\n".join(_as_lines(record, top or _SHOWN_LABELS, is_one)))


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _as_lines(record: dict[str, Any], top: int, is_one: bool) -> Iterator[str]:
    """Yields the lines of a record on the terminal; rows of several begin with where they come from."""
    lines = list(_describe(record, top))
    if is_one:
        yield from lines
    elif len(lines) == 1:
        yield f"{record['origin']}  {lines[0]}"
    else:
        yield f"{record['origin']}  {_clip(record.get('text') or record.get('question') or '')}"
        yield from (f"  {line}" for line in lines)


def _describe(record: dict[str, Any], top: int) -> Iterator[str]:
    match record:
        case {"value": float(value)}:
            yield f"{value:.6g}"
        case {"probabilities": dict(probabilities)}:
            chosen = record["labels"] if "labels" in record else [record["label"]]
            width = max(map(len, probabilities))
            for name, probability in list(probabilities.items())[:top]:
                yield f"{'*' if name in chosen else ' '} {name:<{width}}  {probability:.4f}"
        case {"spans": list(spans)}:
            for span in spans:
                yield f"{span['label']}  {span['text']}  [{span['start']}, {span['end']})  {span['score']:.4f}"
            if not spans:
                yield "nothing is tagged"
        case {"answers": list(answers)}:
            for answer in answers:
                place = f"[{answer['start']}, {answer['end']})" if answer["text"] else ""
                yield f"{answer['text'] or 'no answer'}  {place}  score {answer['score']:.4g}".replace("    ", "  ")
        case {"scores": dict(scores)}:
            for name, score in scores.items():
                yield f"{name}  {score:.6g}"
        case {"masks": list(masks)}:
            for mask in masks:
                fills = ", ".join(f"{fill['token']} {fill['probability']:.4f}" for fill in mask["fills"])
                yield f"[{mask['start']}, {mask['end']})  {fills}"


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else f"{line[: _SHOWN_CHARS - 1]}…"
