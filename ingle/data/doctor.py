"""The data doctor: everything about a dataset that is worth knowing before a run, on a CPU, from its config."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np

from ingle.config.data import DataConfig
from ingle.config.evaluate import TaskConfig
from ingle.data.dataset import TokenDataset, build_dataset
from ingle.data.duplicates import Duplicates, Overlap, find_duplicates, find_overlap
from ingle.data.encoding import TextEncoder
from ingle.data.packing import make_sequences
from ingle.data.report import DataReport, Ending, Packing, Preview, Stretch, measure, render_report
from ingle.data.rows import inspect_rows, render_rows
from ingle.data.sources import read_examples
from ingle.data.statistics import DataStats
from ingle.data.types import IGNORE_INDEX, Ids, Tokenizer
from ingle.events import Progress, Sink
from ingle.wording import plural

__all__ = ["DataReport", "inspect", "inspect_rows", "render_report", "render_rows"]

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
    """Build the dataset as training would, and look at it.

    Args:
        data: What training reads.
        tokenizer: Of the model.
        objective: What training rewards.
        held_out: The task that training is judged by.
        num_previews: Documents to show, evenly spaced.
        seed: Of packing.
        sink: Gets ``Progress`` and every ``Warned`` of :func:`~ingle.data.dataset.build_dataset`.

    Raises:
        DataError: As training would.
        HubUnavailable: As training would.
    """
    sink = sink or (lambda _: None)
    dataset = build_dataset(data, tokenizer, objective=objective, sink=sink)
    sequences = make_sequences(dataset, data, seed)
    sink(Progress("look for duplicates", 0))
    duplicates = find_duplicates(read_examples(data.sources))
    overlap = None
    if held_out is not None:
        sink(Progress("compare with held-out rows", 0))
        overlap = find_overlap(read_examples(data.sources), list(read_examples(held_out.sources)))
    control = TextEncoder(tokenizer).control_ids
    endings = _count_endings(dataset, tokenizer, control)
    return DataReport(
        objective=objective,
        stats=dataset.stats,
        lengths=measure(dataset.lengths),
        packing=Packing(data.packing, len(sequences), data.max_seq_len, sequences.efficiency),
        endings=endings[:_NUM_ENDINGS],
        duplicates=duplicates,
        overlap=overlap,
        previews=tuple(_preview(dataset, i, tokenizer, control) for i in _spread(len(dataset), num_previews)),
        problems=tuple(_find_problems(objective, dataset.stats, endings, duplicates, overlap)),
    )


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()})


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


def _find_problems(
    objective: Literal["clm", "sft"],
    stats: DataStats,
    endings: tuple[Ending, ...],
    duplicates: Duplicates,
    overlap: Overlap | None,
) -> list[str]:
    problems = [f"{plural(r.count, 'row')} skipped: {r.reason} (first {r.first})" for r in stats.dropped]
    problems += [f"{plural(r.count, 'row')}: {r.reason} (first {r.first})" for r in stats.remarks]
    if stats.truncated_documents:
        share = stats.truncated_documents / stats.documents
        verb = "is" if stats.truncated_documents == 1 else "are"
        problems.append(
            f"{plural(stats.truncated_documents, 'document')} ({share:.1%}) {verb} cut; raise data.max_seq_len"
        )
    unended = sum(ending.count for ending in endings if not ending.ends_turn)
    if objective == "sft" and unended:
        verb = "does" if unended == 1 else "do"
        problems.append(f"{plural(unended, 'document')} {verb} not end in a token that stops generation")
    if stats.open_turns:
        problems.append(f"{plural(stats.open_turns, 'trained turn')} without an end-of-turn token in the chat template")
    if stats.supervised_share < 0.05:
        problems.append(f"only {stats.supervised_share:.1%} of the tokens carry loss")
    if duplicates.exact:
        verb = "is an exact duplicate" if duplicates.exact == 1 else "are exact duplicates"
        problems.append(f"{duplicates.exact:,} of {plural(duplicates.rows, 'row')} {verb}")
    if duplicates.near > 0.05 * duplicates.compared:
        verb = "has" if duplicates.near == 1 else "have"
        problems.append(f"{duplicates.near:,} of {plural(duplicates.compared, 'distinct row')} {verb} a near duplicate")
    if overlap is not None and overlap.same_prompt:
        verb = "is" if overlap.same_prompt == 1 else "are"
        problems.append(
            f"{overlap.same_prompt:,} of {plural(overlap.rows, 'held-out prompt')} {verb} in the training data"
        )
    return problems
