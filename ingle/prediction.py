"""Predicts labels, numbers, tags, answers and masked words, with any model that was trained for them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, tee
from pathlib import Path
from typing import Any

from ingle import inference
from ingle.config.data import Source
from ingle.config.objective import Answer, Classify, Mlm, ObjectiveConfig, Tag
from ingle.config.preferences import Reward
from ingle.data import Example, read_examples
from ingle.data.labelled_rows import detect_labelled, find_text, parse_labelled
from ingle.data.layout_detection import rename_columns
from ingle.data.layouts import list_columns
from ingle.data.readers import data_suffix
from ingle.errors import DataError, ModelError
from ingle.evaluation.decoding.tags import find_spans
from ingle.evaluation.run.reward_source import AnswerScores
from ingle.evaluation.run.task_head import TaskHead
from ingle.evaluation.scorers import Prediction
from ingle.events import Progress, Sink

#: A prediction as plain data, as ``ingle predict --json`` prints it.
Record = dict[str, Any]

#: Fills of a mask, by default.
_NUM_FILLS = 5
#: Words with their inner points, hyphens and apostrophes, and single other characters.
_WORD = re.compile(r"\w+(?:[-.'’]\w+)*|[^\w\s]")

_ASKS = {
    "classify": "--text TEXT, with --pair TEXT for a pair",
    "tag": "--text TEXT",
    "answer": "--question TEXT --context TEXT",
    "mlm": "--text TEXT",
    "reward": "--text PROMPT --pair ANSWER",
}


@dataclass(frozen=True)
class Predictor:
    """A loaded model that predicts what it was trained for.

    Attributes:
        head: Its model, and how its rows are read.
    """

    head: TaskHead

    @property
    def objective(self) -> ObjectiveConfig:
        """What the model was trained for, with the names of its labels."""
        return self.head.objective

    def read(self, file: str | Path) -> Iterator[Example]:
        """Yields the rows of a file, in the layouts of training data; labels may be missing.

        A text file has one text per line. Rows to tag may have their words in ``tokens``, or a text.

        Raises:
            DataError: The file is missing, or a row cannot be read; names ``file:line``.
        """
        kind = self.objective.kind
        source = Source(path=str(file), lines=data_suffix(Path(file)) == ".txt")
        if kind == "reward":
            return _read_answers(source)
        parse = _parse_words if kind == "tag" else None
        return read_examples([source], objective=kind, parse=parse)

    def make_row(self, texts: Mapping[str, str], origin: str) -> Example:
        """Returns a row of one text (``text``), a pair (``text``, ``pair``), or ``question`` and ``context``.

        Raises:
            DataError: The model reads other texts.
        """
        expects = {
            "answer": [{"question", "context"}],
            "classify": [{"text"}, {"text", "pair"}],
            "reward": [{"text", "pair"}],
        }
        if set(texts) not in expects.get(self.objective.kind, [{"text"}]):
            given = " and ".join(f"--{name}" for name in texts)
            raise DataError(f"This model does not read {given}.", fix=f"use {_ASKS[self.objective.kind]}")
        if isinstance(self.objective, Reward):
            return Example(origin, prompt=texts["text"], completion=texts["pair"])
        if len(texts) == 1:
            return Example(origin, text=texts["text"])
        return Example(origin, texts={name: Example(origin, text=text) for name, text in texts.items()})

    def predict(
        self, rows: Iterable[Example], *, top: int | None = None, sink: Sink = lambda event: None
    ) -> Iterator[Record]:
        """Yields the prediction of each row, in order. Memory does not grow with the number of rows.

        Args:
            rows: The rows.
            top: Number of labels with probabilities (all by default), of answers (1) or of fills of a mask (5).
            sink: Receives progress, and a warning if texts were cut.

        Raises:
            DataError: A row has no text, or no mask to fill.
        """
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            sink(Progress("Predicting", done))

        rows, read = tee(map(_with_words, rows) if isinstance(self.objective, Tag) else rows)
        made: Iterator[Record]
        match self.objective:
            case Answer():
                can_be_empty = self.objective.no_answer == "allow"
                found = self.head.find_answers(read, report, sink, num_best=top or 1, can_be_empty=can_be_empty)
                made = (_describe_answers(row, answers) for row, answers in zip(rows, found, strict=True))
            case Mlm():
                fills = self.head.fill(read, top or _NUM_FILLS, report, sink)
                made = (self._describe_fills(row, each) for row, each in zip(rows, fills, strict=True))
            case Reward():
                head = self.head
                scores = AnswerScores(head.model, head.tokenizer, self.objective, head.max_seq_len).score(read, report)
                made = (_describe_scores(row, each) for row, each in zip(rows, scores, strict=True))
            case _:
                predictions = self.head.predict(read, report, sink)
                made = (self._describe(row, each, top) for row, each in zip(rows, predictions, strict=True))
        yield from made

    def _describe(self, row: Example, prediction: Prediction, top: int | None) -> Record:
        record: Record = {"origin": row.origin, **_texts(row)}
        match self.objective:
            case Tag(scheme=scheme):
                spans = find_spans(row.text or "", row.words, prediction, self.head.label_names, scheme)
                return record | {"spans": [{name: getattr(span, name) for name in span.__slots__} for span in spans]}
            case Classify(problem="regression"):
                return record | {"value": prediction.scores[0]}
        probabilities = dict(zip(self.head.label_names, map(math.exp, prediction.scores), strict=True))
        best = dict(sorted(probabilities.items(), key=lambda item: -item[1])[:top])
        if self.head.problem == "multi":
            return record | {"labels": list(prediction.labels), "probabilities": best}
        label = prediction.labels[0]
        return record | {"label": label, "probability": probabilities[label], "probabilities": best}

    def _describe_fills(self, row: Example, fills: Iterable[Iterable[Any]]) -> Record:
        text, mask = row.text or "", self.head.tokenizer.mask_token
        places = [match.start() for match in re.finditer(re.escape(mask), text)]
        masks = [
            {
                "start": place,
                "end": place + len(mask),
                "fills": [
                    {"token": self.head.tokenizer.decode([fill.token_id]).strip(), "probability": fill.probability}
                    for fill in each
                ],
            }
            for place, each in zip(places, fills, strict=True)
        ]
        return {"origin": row.origin, "text": text, "masks": masks}


def open_predictor(path_or_id: str, *, allow_mismatch: bool = False, sink: Sink | None = None) -> Predictor:
    """Opens a run folder, an adapter folder, a model folder or a hub id.

    Args:
        path_or_id: What to open.
        allow_mismatch: Attach the adapter to another base than it was trained on; the sink receives a warning.
        sink: Receives progress and warnings.

    Raises:
        ModelError: The model cannot be found or read, or it generates text.
        AdapterError: The adapter does not fit its base, or was trained on another base.
    """
    source = inference.locate(path_or_id)
    objective = source.objective()
    if objective.kind not in _ASKS:
        raise ModelError(
            f"{path_or_id} predicts no labels, tags or answers: it is a language model.",
            fix=f"ingle generate {path_or_id}",
        )
    opened = inference.load(source, allow_mismatch=allow_mismatch, sink=sink)
    longest = inference.longest_document(source, opened)
    return Predictor(TaskHead(opened.model, opened.tokenizer, objective, longest))


def _parse_words(row: Mapping[str, Any], origin: str) -> Example:
    """Reads a row to tag: its words, or a text.

    Raises:
        DataError: It has neither.
    """
    found = detect_labelled(row, "tag")
    if found is None:
        text = find_text(row)
        if text is None:
            raise DataError(
                "The row has no words to tag.",
                where=origin,
                why=f"its columns are {list_columns(row)}",
                fix='write {"tokens": ["one", "word", "each"]} or {"text": "..."}',
            )
        return Example(origin, text=row[text])
    layout, columns = found
    try:
        return replace(parse_labelled(rename_columns(row, columns, origin), layout, origin), label=None)
    except ValueError as error:
        raise DataError("The row cannot be read.", where=origin, why=str(error)) from error


def _read_answers(source: Source) -> Iterator[Example]:
    """Yields rows with several scored answers, or conversations, of which the last message is the answer.

    Raises:
        DataError: The file is missing, or a row cannot be read.
    """
    try:
        rows = read_examples([source], objective="reward")
        first = next(rows, None)
    except DataError:
        yield from read_examples([source], objective="sft")
        return
    if first is not None:
        yield from chain((first,), rows)


def _describe_scores(row: Example, scores: Mapping[str, float]) -> Record:
    """Returns the score of an answer; of several, their scores, and of a pair, the margin of the better one."""
    own = next(iter(row.texts.values()), row)
    record: Record = {"origin": row.origin, "prompt": own.prompt}
    if own.messages:
        record["prompt"] = [{"role": each.role, "content": each.content} for each in own.messages[:-1]]
    if not row.texts:
        return record | {"value": scores["answer"]}
    record["scores"] = dict(scores)
    if {"chosen", "rejected"} == set(scores):
        record["margin"] = scores["chosen"] - scores["rejected"]
    return record


def _with_words(row: Example) -> Example:
    if row.words:
        return row
    return replace(row, words=tuple(match.span() for match in _WORD.finditer(row.text or "")))


def _texts(row: Example) -> Record:
    if row.texts:
        return {name.removeprefix("text_"): part.text for name, part in row.texts.items()}
    return {"text": row.text}


def _describe_answers(row: Example, answers: Iterable[Any]) -> Record:
    context = row.texts["context"].text or ""
    found = [
        {"text": context[each.start : each.end], "start": each.start, "end": each.end, "score": each.score}
        for each in answers
    ]
    return {"origin": row.origin, **_texts(row), "answers": found}
