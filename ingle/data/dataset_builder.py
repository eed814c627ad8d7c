"""Builds a dataset in one pass over the sources.

A small dataset is tokenized in this process and stays in memory. A large one is tokenized chunk by chunk in worker
processes, into a cache on disk from which it is read through memory maps; the next run opens it without tokenizing.
The documents, the counts and their order are the same in both cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import fields
from typing import Any

from ingle.config.data import DataConfig, Source
from ingle.config.objective import ObjectiveConfig, ObjectiveKind, samples_answers
from ingle.data.cache import DataCache, Entry, can_cache
from ingle.data.chunks import Chunk, cut_source
from ingle.data.dataset import TokenDataset
from ingle.data.duplicates import RowSearch
from ingle.data.label_names import describe_classes
from ingle.data.row_encoder import Counts, ModelKind, Tally, TokenOptions, token_options
from ingle.data.row_tokenizer import RowTokenizer
from ingle.data.shards import Shard, ShardedTokens, Stored, open_shard
from ingle.data.sources import find_files, read_examples
from ingle.data.types import Example, RowParser, Tokenizer
from ingle.data.worker import Task, batches
from ingle.data.worker_pool import WorkerPool
from ingle.errors import CheckpointError, DataError
from ingle.events import Progress, Sink, Warned
from ingle.report.data_results import DataStats, SourceShare
from ingle.wording import plural

#: Smaller sources are tokenized in this process and kept in memory.
_CACHED_BYTES = 8 << 20
#: A row is estimated at this many bytes where only their number is known.
_ROW_BYTES = 1 << 10
#: A dataset of at most this size is kept in memory if the cache cannot be written.
_MEMORY_BYTES = 1 << 30

_STAGE = "Tokenizing rows"
_LENGTH = "data.max_seq_len"


def build_dataset(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    objective: ObjectiveConfig | ObjectiveKind,
    model_kind: ModelKind = "causal",
    sink: Sink | None = None,
    parse: RowParser | None = None,
    on_example: Callable[[Example], None] | None = None,
    search: RowSearch | None = None,
) -> TokenDataset:
    """Reads, renders, tokenizes and masks all sources.

    The documents of a row with several texts are adjacent and kept or dropped together.

    Args:
        data: Sources and options.
        tokenizer: The model's tokenizer.
        objective: Its kind, or a section in which labels have names (:func:`~ingle.data.label_names.name_labels`).
        model_kind: What reads the answers of ``reward``, ``dpo`` and their kin; others know it by their objective.
        sink: Receives ``Progress``, and ``Warned`` for everything that was skipped, cut or unusual.
        parse: Reads rows; by default they are read in the layout of their source.
        on_example: Called with every row, in order. Large sources are read once more for it.
        search: Receives every row; large sources are not read again for it.

    Raises:
        DataError: A row is malformed, a template cannot be masked, or no document is left.
        ConfigError: ``too_long: split`` with conversations.
        HubUnavailable: A hub dataset cannot be reached.
    """
    options = token_options(data, objective, model_kind)
    sink = sink or (lambda _: None)
    dataset = _build(data, tokenizer, options, sink, parse, on_example, search)
    if options.objective == "classify" and options.labels:
        for warning in describe_classes(dataset, options.labels):
            sink(Warned(warning, where="objective.labels"))
    return dataset


def _build(
    data: DataConfig,
    tokenizer: Tokenizer,
    options: TokenOptions,
    sink: Sink,
    parse: RowParser | None,
    on_example: Callable[[Example], None] | None,
    search: RowSearch | None,
) -> TokenDataset:
    if parse is None and is_large(data) and can_cache(tokenizer):
        dataset = _CachedBuild(data, tokenizer, options, sink, search).build()
        if on_example is not None:
            for example in read_examples(data.sources, objective=options.objective):
                on_example(example)
        return dataset
    return _build_in_memory(data, tokenizer, options, sink, parse, _both(on_example, search))


def is_large(data: DataConfig) -> bool:
    """Returns whether the sources are so large that they are tokenized into the cache."""
    return sum(map(_estimate_bytes, data.sources)) >= _CACHED_BYTES


def _estimate_bytes(source: Source) -> int:
    limit = None if source.limit is None else source.limit * _ROW_BYTES
    if limit is not None and limit < _CACHED_BYTES:
        return limit
    paths = find_files(source.path)
    if paths is None:
        return _CACHED_BYTES  # a hub dataset, of unknown size
    size = sum(path.stat().st_size for path in paths)
    return size if limit is None else min(size, limit)


def _both(on_example: Callable[[Example], None] | None, search: RowSearch | None) -> Callable[[Example], object] | None:
    if search is None:
        return on_example
    if on_example is None:
        return search.add

    def add(example: Example) -> None:
        on_example(example)
        search.add(example)

    return add


def _build_in_memory(
    data: DataConfig,
    tokenizer: Tokenizer,
    options: TokenOptions,
    sink: Sink,
    parse: RowParser | None,
    on_example: Callable[[Example], object] | None,
) -> TokenDataset:
    rows = RowTokenizer(tokenizer, options, with_keys=data.validation is not None)

    def read(source: Source) -> Iterator[Example]:
        examples = read_examples(
            [source], objective=options.objective, parse=parse, on_warning=lambda message: sink(Warned(message))
        )
        for example in examples:
            if on_example is not None:
                on_example(example)
            yield example

    shares = []
    for source in data.sources:
        before = _totals(rows.counts)
        for batch in batches(read(source)):
            rows.add(batch)
            sink(Progress(_STAGE, rows.counts.rows))
        shares.append(_share(source, before, _totals(rows.counts)))
    found = rows.close()
    if data.validation is not None:
        found.tokens.keys = found.keys.find(map(found.tokens.origins.at, range(len(found.tokens.lengths))))
    stats = _close(found.counts, tuple(shares), data, options.objective, tokenizer, sink)
    return TokenDataset(found.tokens, stats, found.groups, found.document_columns)


class _CachedBuild:
    """Builds a dataset of files in the cache."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        options: TokenOptions,
        sink: Sink,
        search: RowSearch | None,
    ) -> None:
        self.data, self.tokenizer, self.options, self.sink, self.search = data, tokenizer, options, sink, search
        self.cache = DataCache(data, tokenizer, options)
        self.writable, self.in_memory = True, 0
        self._start()

    def _start(self) -> None:
        self.counts, self.entries, self.stored = Counts(), list[Entry](), list[Stored]()
        self.warnings: list[str] = []
        self.marks = [_totals(self.counts)] * (len(self.data.sources) + 1)

    def build(self) -> TokenDataset:
        if not self._open_known():
            with ExitStack() as stack:
                try:
                    stack.enter_context(self.cache.locked(self._report_wait))
                except OSError as error:
                    self._give_up_disk(str(error))
                if not self._open_known():  # another process may have tokenized it in the meantime
                    self._tokenize()
        pairs = zip(self.data.sources, self.marks, self.marks[1:], strict=False)
        shares = tuple(_share(source, before, after) for source, before, after in pairs)
        stats = _close(self.counts, shares, self.data, self.options.objective, self.tokenizer, self.sink)
        memo = self.cache.memo(self.entries) if self.writable else None
        tokens = ShardedTokens(self.stored, memo)
        return TokenDataset(tokens, stats, tokens.groups(), tokens.document_columns())

    def _report_wait(self) -> None:
        self.sink(Progress("Waiting for another process that tokenizes the same data", 0))

    def _open_known(self) -> bool:
        """Opens all shards that the index names; returns False if one of them is not there."""
        entries = self.cache.read_index()
        if entries is None:
            return False
        for entry in entries:
            stored = Stored(self.cache.path(entry.name), entry.prefix, entry.base)
            shard = open_shard(self.cache.path(entry.name))
            if shard is None:
                self._start()
                return False
            self._add(entry, stored, shard)
        for warning in (warning for entry in entries for warning in entry.warnings):
            self.sink(Warned(warning))
        self.sink(Progress(_STAGE, self.counts.rows))
        return True

    def _tokenize(self) -> None:
        began_ns = time.time_ns()
        with WorkerPool(self.tokenizer, self.options) as pool:
            for (number, chunk), unsaved in pool.map(self._tasks()):
                entry = Entry(number, self.cache.name(chunk), chunk.prefix, chunk.base, chunk.warnings)
                stored = Stored(self.cache.path(entry.name), entry.prefix, entry.base)
                if unsaved is not None:
                    stored = Stored(unsaved.shard, entry.prefix, entry.base)
                    self._give_up_disk(unsaved.why, unsaved.shard.nbytes)
                for warning in chunk.warnings:
                    self.sink(Warned(warning))
                self._add(entry, stored, stored.load())
                self.sink(Progress(_STAGE, self.counts.rows))
        if self.writable:
            with suppress(OSError, CheckpointError):  # only the next start is slower
                self.cache.write_index(self.entries, began_ns)

    def _tasks(self) -> Iterator[tuple[tuple[int, Chunk], Task | None]]:
        """Yields the chunks of all sources, each with its task unless its shard exists."""
        for number, source in enumerate(self.data.sources):
            for chunk in cut_source(source, self.options.objective):
                path = self.cache.path(self.cache.name(chunk))
                is_known = open_shard(path) is not None
                yield (number, chunk), None if is_known else Task(chunk, path if self.writable else None)

    def _add(self, entry: Entry, stored: Stored, shard: Shard) -> None:
        self.counts.add(stored.counts(shard))
        self.entries.append(entry)
        if len(shard.lengths):
            self.stored.append(stored)
        for number in range(entry.source, len(self.data.sources)):
            self.marks[number + 1] = _totals(self.counts)
        if self.search is not None:
            # The search must not keep the shard, whose pages would stay in memory.
            self.search.add_keys(shard.prompts, shard.rows, lambda i: stored.origin(int(stored.load().row_numbers[i])))

    def _give_up_disk(self, why: str, num_bytes: int = 0) -> None:
        """Keeps the tokens in memory from here on, as long as they are few."""
        if self.writable:
            self.writable = False
            message = f"The data cache cannot be written, so tokens are kept in memory and not for the next run: {why}."
            self.sink(Warned(message, where=str(self.cache.folder)))
        self.in_memory += num_bytes
        if self.in_memory > _MEMORY_BYTES:
            raise DataError(
                "The data cache cannot be written, and the data is too large to be kept in memory.",
                where=str(self.cache.folder),
                why=why,
                fix="free some space, or name a folder on another disk in the environment variable INGLE_CACHE",
            )


def _totals(counts: Counts) -> tuple[int, int, int, int]:
    return counts.rows, counts.documents, counts.tokens, counts.supervised_tokens


def _share(source: Source, before: tuple[int, ...], after: tuple[int, ...]) -> SourceShare:
    return SourceShare(source.path, *(b - a for a, b in zip(before, after, strict=True)))


def _close(
    counts: Counts,
    sources: tuple[SourceShare, ...],
    data: DataConfig,
    objective: ObjectiveKind,
    tokenizer: Tokenizer,
    sink: Sink,
) -> DataStats:
    """Returns the figures of a dataset, and warns of everything unusual.

    Raises:
        DataError: There is no document.
    """
    figures = {entry.name: getattr(counts, entry.name) for entry in fields(counts)}
    closed: dict[str, Any] = {name: v.close() if isinstance(v, Tally) else v for name, v in figures.items()}
    stats = DataStats(**closed, sources=sources)
    if not stats.documents:
        reasons = (f"{plural(r.count, 'row')} skipped, first {r.first}: {r.reason}" for r in stats.dropped)
        lacking = "prompt" if samples_answers(objective) else "document with a supervised token"
        raise DataError(
            f"The training data has no {lacking}.",
            where="data.sources: " + ", ".join(source.path for source in data.sources),
            why=" ".join(reasons).removesuffix(".") or "no rows",
            fix="`ingle data inspect CONFIG` shows why rows are skipped",
        )
    for warning in _warnings(stats, data.max_seq_len, has_eos=tokenizer.eos_token_id is not None):
        sink(warning)
    return stats


def _warnings(stats: DataStats, max_seq_len: int, *, has_eos: bool) -> Iterator[Warned]:
    for remark in stats.dropped:
        yield Warned(f"Rows skipped: {remark.reason}", remark.first, remark.count)
    for remark in stats.remarks:
        yield Warned(remark.reason, remark.first, remark.count)
    if stats.truncated_documents:
        yield describe_cuts(stats, max_seq_len)
    if stats.cut_ends:
        yield Warned("Truncated answers have no end-of-turn token.", _LENGTH, stats.cut_ends)
    if stats.open_turns:
        why = "." if has_eos else "; the tokenizer has no end-of-text token."
        yield Warned(f"Trained turns have no end-of-turn token{why}", count=stats.open_turns)


def describe_cuts(counts: Counts | DataStats, max_seq_len: int) -> Warned:
    """Returns the warning that documents were too long."""
    lost = plural(counts.truncated_tokens, "token")
    message = f"Documents were truncated to data.max_seq_len = {max_seq_len}; {lost} lost."
    return Warned(message, _LENGTH, counts.truncated_documents)
