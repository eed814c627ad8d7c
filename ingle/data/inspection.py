"""Inspects a dataset before a run, on a CPU and from its config; without a model, the rows of a data file."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from ingle.config.data import DataConfig, Source
from ingle.config.evaluate import TaskConfig
from ingle.data.dataset import TokenDataset
from ingle.data.dataset_builder import build_dataset
from ingle.data.duplicates import DuplicateSearch, OverlapSearch
from ingle.data.encoding import TextEncoder
from ingle.data.layouts import detect_layout
from ingle.data.packing import make_sequences
from ingle.data.readers import read_rows
from ingle.data.sources import find_files, read_examples
from ingle.data.types import IGNORE_INDEX, Example, Ids, Tokenizer, last_answer
from ingle.errors import DataError
from ingle.events import Progress, Sink
from ingle.report.data_results import (
    Bar,
    DataReport,
    Ending,
    Lengths,
    Packing,
    Preview,
    RowPreview,
    RowsReport,
    Stretch,
)
from ingle.report.data_tables import duplicate_problems, find_problems
from ingle.wording import plural

_NUM_BARS = 12
_NUM_ENDINGS = 4


def inspect(
    data: DataConfig,
    tokenizer: Tokenizer,
    objective: Literal["clm", "sft"],
    held_out: TaskConfig | None = None,
    *,
    num_previews: int = 3,
    seed: int = 0,
    sink: Sink | None = None,
) -> DataReport:
    """Builds the dataset as training does, and reports its figures and problems.

    Args:
        data: Sources and options.
        tokenizer: The model's tokenizer.
        objective: ``clm`` or ``sft``.
        held_out: The evaluation task, whose rows should not be in the training data.
        num_previews: Number of documents to show, evenly spaced.
        seed: Seed of packing.
        sink: Receives ``Progress``, and every ``Warned`` of :func:`~ingle.data.build_dataset`.

    Raises:
        DataError: As training would.
        HubUnavailable: As training would.
    """
    sink = sink or (lambda _: None)
    duplicates = DuplicateSearch()
    overlap = OverlapSearch(list(read_examples(held_out.sources))) if held_out is not None else None

    def search(example: Example) -> None:
        duplicates.add(example)
        if overlap is not None:
            overlap.add(example)

    dataset = build_dataset(data, tokenizer, objective=objective, sink=sink, on_example=search)
    sequences = make_sequences(dataset, data, seed)
    sink(Progress("Finding duplicates", 0))
    found, shared = duplicates.result(), overlap.result() if overlap is not None else None
    control = TextEncoder(tokenizer).control_ids
    endings = _count_endings(dataset, tokenizer, control)
    return DataReport(
        objective=objective,
        stats=dataset.stats,
        lengths=_measure(dataset.lengths),
        packing=Packing(data.packing, len(sequences), data.max_seq_len, sequences.efficiency),
        endings=endings[:_NUM_ENDINGS],
        duplicates=found,
        overlap=shared,
        previews=tuple(_preview(dataset, i, tokenizer, control) for i in _spread(len(dataset), num_previews)),
        problems=find_problems(objective, dataset.stats, endings, found, shared),
    )


def inspect_rows(path: str, *, num_previews: int = 3) -> RowsReport:
    """Reads a file, folder or glob as ``data.sources`` would, and reports on its rows without a model.

    Raises:
        DataError: It is missing, or a row is malformed.
    """
    files = find_files(path)
    if files is None:
        raise DataError("The data file does not exist.", where=path, fix="check the path")
    layouts: Counter[str] = Counter()
    columns: tuple[str, ...] = ()
    problems: list[str] = []
    examples: list[Example] = []
    for file in files:
        place, first = next(iter(read_rows(file)))
        layout, others = detect_layout(first, f"{file}:{place}")
        columns = columns or tuple(first)
        if others:
            problems.append(f"{file} could also be read as {', '.join(others)}; set layout: in data.sources.")
        read = list(read_examples([Source(path=str(file))]))
        layouts[layout] += len(read)
        examples += read
    duplicates = DuplicateSearch()
    for example in examples:
        duplicates.add(example)
    found = duplicates.result()
    previews = [examples[i] for i in _spread(len(examples), num_previews)]
    return RowsReport(
        path=path,
        rows=len(examples),
        layouts=dict(layouts),
        columns=columns,
        characters=_measure(np.array([sum(len(text) for _, text in _parts(example)) for example in examples])),
        duplicates=found,
        previews=tuple(RowPreview(example.origin, _parts(example)) for example in previews),
        problems=(*problems, *_find_empty(examples), *duplicate_problems(found)),
    )


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()})


def _measure(lengths: npt.NDArray[np.int64]) -> Lengths:
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _NUM_BARS)
    counts = np.bincount((lengths - low) // width)
    bars = (Bar(low + i * width, min(low + (i + 1) * width - 1, high), int(n)) for i, n in enumerate(counts))
    return Lengths(
        min=low,
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        p95=float(np.percentile(lengths, 95)),
        max=high,
        histogram=tuple(bars),
    )


def _count_endings(dataset: TokenDataset, tokenizer: Tokenizer, control: Ids) -> tuple[Ending, ...]:
    counts = Counter(dataset.closing_ids().tolist()).most_common()
    return tuple(Ending(_decode(tokenizer, [token]), count, token in control) for token, count in counts)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _preview(dataset: TokenDataset, i: int, tokenizer: Tokenizer, control: Ids) -> Preview:
    sample = dataset.sample(i)
    supervised = sample.labels != IGNORE_INDEX
    special = np.isin(sample.input_ids, control)
    changes = np.flatnonzero((np.diff(supervised) | np.diff(special)) != 0) + 1
    borders = [0, *changes.tolist(), len(supervised)]
    stretches = tuple(
        Stretch(_decode(tokenizer, sample.input_ids[a:b].tolist()), bool(supervised[a]), bool(special[a]))
        for a, b in pairwise(borders)
    )
    return Preview(dataset.origin(i), len(supervised), int(supervised.sum()), stretches)


def _parts(example: Example) -> tuple[tuple[str, str], ...]:
    if example.text is not None:
        return (("text", example.text),)
    if example.prompt is not None:
        return (("prompt", example.prompt), ("completion", example.completion or ""))
    return tuple((message.role, message.content) for message in example.messages)


def _find_empty(examples: list[Example]) -> list[str]:
    problems = []
    answers = [(e.origin, e.text if e.text is not None else last_answer(e)) for e in examples]
    missing = [origin for origin, answer in answers if answer is None]
    empty = [origin for origin, answer in answers if answer is not None and not answer.strip()]
    if missing:
        problems.append(f"{plural(len(missing), 'row')} without an assistant turn (first {missing[0]}).")
    if empty:
        problems.append(f"{plural(len(empty), 'row')} with an empty answer or text (first {empty[0]}).")
    return problems
