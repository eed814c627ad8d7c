"""Inspects a dataset before a run, on a CPU and from its config; without a model, the rows of a data file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, pairwise

import numpy as np

from ingle.config.data import DataConfig, Source
from ingle.config.evaluate import TaskConfig
from ingle.config.objective import (
    FAMILY,
    Classify,
    ObjectiveConfig,
    ObjectiveKind,
    Tag,
    reads_answers,
    rows_of,
    samples_answers,
)
from ingle.data.dataset import GrowingArray, TokenDataset
from ingle.data.dataset import Lengths as DocumentLengths
from ingle.data.dataset_builder import build_dataset
from ingle.data.duplicates import DuplicateSearch, OverlapSearch
from ingle.data.encode_windows import find_null
from ingle.data.label_names import describe_classes, name_labels
from ingle.data.layout_detection import detect_source, guess_objective
from ingle.data.packing import make_sequences
from ingle.data.preference_doctor import examine
from ingle.data.previews import Previews
from ingle.data.prompt_rows import write_column
from ingle.data.prompts import PromptSet, build_prompts
from ingle.data.row_encoder import ModelKind, Tally
from ingle.data.row_parts import show_label
from ingle.data.sources import find_files, open_tables, read_examples, sample_examples
from ingle.data.types import Example, Tokenizer, last_answer
from ingle.errors import DataError
from ingle.events import Progress, Sink
from ingle.report.data_results import (
    Bar,
    DataReport,
    Ending,
    LabelShare,
    Lengths,
    Packing,
    RewardColumn,
    RowPreview,
    RowsReport,
)
from ingle.report.data_tables import duplicate_problems, find_problems
from ingle.report.preference_tables import preference_problems
from ingle.wording import plural

_NUM_BARS = 12
_NUM_ENDINGS = 4
#: Documents in which unknown tokens are counted.
_NUM_SAMPLED = 2000


def inspect(
    data: DataConfig,
    tokenizer: Tokenizer,
    objective: ObjectiveConfig,
    held_out: TaskConfig | None = None,
    *,
    model_kind: ModelKind = "causal",
    num_previews: int = 3,
    seed: int = 0,
    sink: Sink | None = None,
) -> DataReport:
    """Builds the dataset as training does, and reports its figures and problems.

    Args:
        data: Sources and options.
        tokenizer: The model's tokenizer.
        objective: The section, with or without the names of its labels.
        held_out: The evaluation task, whose rows should not be in the training data.
        model_kind: What reads the tokens.
        num_previews: Number of documents to show, evenly spaced; of rows with several answers, as many rows.
        seed: Seed of packing.
        sink: Receives ``Progress``, and every ``Warned`` of :func:`~ingle.data.build_dataset`.

    Raises:
        DataError: As training would.
        HubUnavailable: As training would.
    """
    sink = sink or (lambda _: None)
    duplicates = DuplicateSearch()
    objective = rows_of(name_labels(data, objective))
    kind = objective.kind
    is_sampled = samples_answers(kind)
    asked: ObjectiveKind = "sft" if reads_answers(kind) or is_sampled else kind  # a task asks for answers
    rows = [] if held_out is None else list(read_examples(held_out.sources, objective=asked))
    overlap = OverlapSearch(rows) if held_out is not None else None

    on_example = None if overlap is None else overlap.add
    dataset = (build_prompts if is_sampled else build_dataset)(
        data,
        tokenizer,
        objective=objective,
        model_kind=model_kind,
        sink=sink,
        on_example=on_example,
        search=duplicates,
    )
    if is_sampled:
        data = data.model_copy(update={"packing": False})  # an answer follows every prompt
    sequences = make_sequences(dataset, data, seed)
    sink(Progress("Finding duplicates", 0))
    if not duplicates.num_texts:
        step = duplicates.step
        for number, example in enumerate(sample_examples(data.sources, step, kind)):
            duplicates.add_text(number * step, example)
    found, shared = duplicates.result(), overlap.result() if overlap is not None else None
    previews = Previews(dataset, tokenizer, objective, seed)
    has_targets = dataset.groups is not None and "source" in dataset.groups.names
    writes = kind in ("clm", "sft") or (reads_answers(kind) and model_kind == "causal")
    endings = _count_endings(dataset, previews) if writes else ()
    labels = _count_labels(dataset, objective)
    problems = find_problems(kind, dataset.stats, endings, found, shared, _unknown_share(dataset, tokenizer))
    if kind == "classify":
        problems += tuple(describe_classes(dataset, [each.name for each in labels]))
    preferences = None
    if reads_answers(kind):
        preferences = examine(dataset, is_judged=FAMILY[kind] == "judged", sink=sink)
        problems += tuple(preference_problems(preferences))
    return DataReport(
        objective=kind,
        stats=dataset.stats,
        lengths=_measure(dataset.lengths[::2] if has_targets else dataset.lengths),
        packing=Packing(data.packing, len(sequences), sequences.room, sequences.efficiency),
        endings=endings[:_NUM_ENDINGS],
        duplicates=found,
        overlap=shared,
        previews=tuple(previews.show(i) for i in _choose_shown(dataset, num_previews)),
        problems=problems,
        labels=labels,
        answered=_count_answered(dataset, tokenizer) if kind == "answer" else None,
        targets=_measure(dataset.lengths[1::2]) if has_targets else None,
        preferences=preferences,
        columns=_count_columns(dataset) if isinstance(dataset, PromptSet) else (),
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
    sources = [Source(path=str(file)) for file in files]
    objectives, labels = dict[str, ObjectiveKind](), Counter[str]()
    num_chars, duplicates, empty = GrowingArray(np.int64), DuplicateSearch(), Tally()
    for source in sources:
        table = next(open_tables(source))
        place, first = next(table.rows)
        kind = objectives[source.path] = guess_objective(first, f"{source.path}:{place}")
        fixed, warning = detect_source(first, source, kind, source.path, f"{source.path}:{place}")
        columns = columns or tuple(first)
        if warning is not None:
            problems.append(warning)
        for example in read_examples([source], objective=kind):
            layouts[fixed.layout] += 1
            if kind in ("classify", "tag") and example.label is not None:
                labels.update([example.label] if isinstance(example.label, str) else map(str, example.label))
            num_chars.append(sum(len(text) for _, text in _parts(example)))
            duplicates.add(example)
            if (lack := _find_empty(example)) is not None:
                empty.add(lack, example.origin)
    found = duplicates.result()
    rows = layouts.total()
    read_all = chain.from_iterable(read_examples([each], objective=objectives[each.path]) for each in sources)
    return RowsReport(
        path=path,
        rows=rows,
        layouts=dict(layouts),
        columns=columns,
        characters=_measure(num_chars.close()),
        duplicates=found,
        previews=tuple(
            RowPreview(example.origin, _parts(example)) for example in _pick(read_all, _spread(rows, num_previews))
        ),
        problems=(*problems, *_describe_empty(empty), *duplicate_problems(found)),
        labels=dict(labels),
    )


def guess_file(path: str) -> ObjectiveKind:
    """Returns an objective for which the rows of a file could be meant, by the first of them.

    Raises:
        DataError: The file is missing or malformed, or no layout fits.
    """
    files = find_files(path)
    table = next(open_tables(Source(path=str(files[0]) if files else path)))
    place, first = next(table.rows)
    return guess_objective(first, f"{table.name}:{place}")


def _pick(examples: Iterator[Example], places: list[int]) -> Iterator[Example]:
    """Yields the examples at ascending places."""
    for before, place in pairwise([-1, *places]):
        yield next(islice(examples, place - before - 1, None))


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()})


def _choose_shown(dataset: TokenDataset, num_previews: int) -> list[int]:
    """Returns the documents to show, evenly spaced; of a row with several answers, all of them."""
    if dataset.groups is None or not dataset.has_document_column("scores"):
        return _spread(len(dataset), num_previews)
    offsets = dataset.groups.offsets
    rows = _spread(len(offsets) - 1, num_previews)
    documents = (i for row in rows for i in range(offsets[row], offsets[row + 1]))
    return [i for i in documents if dataset.text_name(i) != "source"]


def _measure(lengths: DocumentLengths) -> Lengths:
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


def _unknown_share(dataset: TokenDataset, tokenizer: Tokenizer) -> float:
    """Returns the share of tokens without meaning, in evenly spaced documents."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # byte-level, as GPT-2's
        return 0.0
    found = [dataset.sample(i).input_ids for i in _spread(len(dataset), _NUM_SAMPLED)]
    return float((np.concatenate(found) == unknown).mean())


def _count_endings(dataset: TokenDataset, previews: Previews) -> tuple[Ending, ...]:
    closing = dataset.closing_ids()
    counts = np.bincount(closing)
    first = np.zeros(len(counts), dtype=np.int32)
    first[closing[::-1]] = np.arange(len(closing), dtype=np.int32)[::-1]  # the last value stays
    tokens = sorted(np.flatnonzero(counts).tolist(), key=lambda token: (-counts[token], first[token]))
    return tuple(
        Ending(previews.decode(np.array([token])), int(counts[token]), token in previews.control_ids)
        for token in tokens
    )


def _count_labels(dataset: TokenDataset, objective: ObjectiveConfig) -> tuple[LabelShare, ...]:
    if not isinstance(objective, Classify | Tag) or not objective.labels:
        return ()
    counts = dataset.label_counts(len(objective.labels)).tolist()
    if isinstance(objective, Tag):
        return tuple(map(LabelShare, objective.labels, counts))
    labels = dataset.document_column("document_labels")
    if labels.ndim == 2:
        tokens = (labels == 1).T @ dataset.lengths.astype(np.float64)
    else:
        tokens = np.bincount(labels.astype(np.int64), dataset.lengths, len(counts))
    return tuple(map(LabelShare, objective.labels, counts, (tokens / np.maximum(counts, 1)).tolist()))


def _count_columns(prompts: PromptSet) -> tuple[RewardColumn, ...]:
    """Counts the prompts that have a value in each column."""
    rows = (prompts.columns(i) for i in range(len(prompts)))
    found = Counter(name for row in rows for name, value in row.items() if value is not None)
    return tuple(RewardColumn(name, found[name]) for name in prompts.column_names)


def _count_answered(dataset: TokenDataset, tokenizer: Tokenizer) -> int:
    """Counts the windows with an answer; all others name their CLS token, which stands first or last."""
    starts, ends = (dataset.document_column(f"{side}_labels") for side in ("start", "end"))
    cls = getattr(tokenizer, "cls_token_id", None)
    single = np.flatnonzero(starts == ends).tolist()
    return len(starts) - sum(find_null(dataset.sample(i).input_ids, cls) == int(starts[i]) for i in single)


def _parts(example: Example) -> tuple[tuple[str, str], ...]:
    if "scores" in example.labels:
        return (*_parts(replace(example, labels={})), ("score", f"{example.labels['scores']:g}"))
    if any("scores" in each.labels for each in example.texts.values()):
        first = next(iter(example.texts.values()))
        prompt = _parts(replace(first, labels={}))[:-1]
        answers = (
            (f"{name} (score {each.labels['scores']:g})", last_answer(each) or "")
            for name, each in example.texts.items()
        )
        return (*prompt, *answers)
    if example.label is not None or example.texts:
        texts = {name: each.text or "" for name, each in example.texts.items()} or {"text": example.text or ""}
        return (*texts.items(), ("label", show_label(example)))
    if example.text is not None:
        return (("text", example.text),)
    if example.columns:
        columns = ((name, write_column(value)) for name, value in example.columns.items())
        return (*_parts(replace(example, columns={})), *columns)
    if example.prompt is not None:
        completion = [("completion", example.completion)] if example.completion else []
        return (("prompt", example.prompt), *completion)
    return tuple((message.role, message.content) for message in example.messages)


_NO_ANSWER, _EMPTY = "without an assistant turn", "with an empty answer or text"


def _find_empty(example: Example) -> str | None:
    """Returns what is wrong if there is nothing to learn from a row."""
    if any("scores" in each.labels for each in example.texts.values()):
        return next((fault for fault in map(_find_empty, example.texts.values()) if fault is not None), None)
    texts = [text.text or "" for text in example.texts.values()]
    answer = example.text if example.text is not None else " ".join(texts) if texts else last_answer(example)
    if answer is None:
        return _NO_ANSWER
    return None if answer.strip() else _EMPTY


def _describe_empty(found: Tally) -> list[str]:
    remarks = {remark.reason: remark for remark in found.close()}
    return [
        f"{plural(remarks[kind].count, 'row')} {kind} (first {remarks[kind].first})."
        for kind in (_NO_ANSWER, _EMPTY)
        if kind in remarks
    ]
