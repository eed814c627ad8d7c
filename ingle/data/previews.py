"""Shows documents as the model sees them: what carries loss, labels, masks, and spans with their sentinels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ingle.config.objective import Classify, Mlm, ObjectiveConfig, Span, Tag
from ingle.data.corruption import Corruption, Infilling, Masking, SpanCorruption, Target, is_special
from ingle.data.counters import FIXED_EPOCH, Place
from ingle.data.dataset import TokenDataset
from ingle.data.encoding import TextEncoder
from ingle.data.prompt_rows import write_column
from ingle.data.prompts import PromptSet
from ingle.data.types import IGNORE_INDEX, Ids, Mask, Sample, Tokenizer
from ingle.report.data_results import Preview, Stretch


class Previews:
    """Shows documents of a dataset.

    Args:
        dataset: The documents.
        tokenizer: The model's tokenizer.
        objective: With the names of its labels.
        seed: Seed of the run, which decides on masks.

    Raises:
        ConfigError: The tokenizer lacks a token that the objective needs.
    """

    def __init__(self, dataset: TokenDataset, tokenizer: Tokenizer, objective: ObjectiveConfig, seed: int) -> None:
        self._dataset, self._tokenizer, self._objective = dataset, tokenizer, objective
        self.control_ids = TextEncoder(tokenizer).control_ids
        self._corrupt = _corruption(objective, tokenizer, seed, int(dataset.lengths.max()))

    def show(self, i: int) -> Preview:
        """Returns document ``i``; a target together with its source."""
        groups, target = self._dataset.groups, None
        if groups is not None and "source" in groups.names:
            i -= i % 2  # sources and targets alternate
            target = self._dataset.sample(i + 1).input_ids
        sample = self._dataset.sample(i)
        ids, notes = sample.input_ids, dict[int, str]()
        supervised = sample.labels != IGNORE_INDEX
        if self._corrupt is not None:
            (seen,) = self._corrupt([sample], [Place(FIXED_EPOCH, i)])
            target = seen.columns.get("decoder_labels")
            supervised = seen.labels != IGNORE_INDEX
            if target is None:
                notes = {int(k): _visible(self.decode(ids[k : k + 1])) for k in np.flatnonzero(supervised)}
            ids = seen.input_ids
        label, marks, tags = self._read_labels(sample)
        if "scores" in sample.columns:
            name = self._dataset.text_name(i if target is None else i + 1)
            label = f"{name} (score {float(sample.columns['scores'][0]):g})".strip()
        shown = supervised if marks is None else marks
        stretches = tuple(self._stretch(ids, shown, {**notes, **tags}))
        after = tuple(self._stretch(target, np.ones(len(target), np.bool_), {})) if target is not None else ()
        num_supervised = int(shown.sum()) if target is None else len(target)
        types = _count_runs(sample.columns["token_type_ids"]) if "token_type_ids" in sample.columns else ()
        columns: tuple[tuple[str, str], ...] = ()
        if isinstance(self._dataset, PromptSet):
            columns = tuple((name, write_column(value)) for name, value in self._dataset.columns(i).items())
        return Preview(self._dataset.origin(i), len(ids), num_supervised, stretches, label, after, types, columns)

    def decode(self, ids: Ids) -> str:
        """Returns the text of tokens, with special tokens."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _read_labels(self, sample: Sample) -> tuple[str, Mask | None, Mapping[int, str]]:
        """Returns the label of a document, the tokens that it marks, and notes on tokens."""
        columns = sample.columns
        match self._objective:
            case Classify(labels=names, problem=problem):
                values = columns["document_labels"][0]
                if problem == "multi":
                    chosen = [name for name, value in zip(names or (), values, strict=True) if value]
                    return ", ".join(chosen) or "no label", None, {}
                return (names[int(values)] if names and problem == "single" else f"{float(values):g}"), None, {}
            case Tag(labels=names):
                tags = columns["token_labels"]
                named = {int(k): (names or ())[tags[k]] for k in np.flatnonzero(tags >= 0)}
                return "", tags >= 0, {k: tag for k, tag in named.items() if tag != "O"}
        if "start_labels" in columns:
            first, last = (int(columns[name][0]) for name in ("start_labels", "end_labels"))
            marks = np.zeros(len(sample.input_ids), np.bool_)
            marks[first : last + 1] = True
            return "", marks, {}
        return "", None, {}

    def _stretch(self, ids: npt.NDArray[np.int32], supervised: Mask, notes: Mapping[int, str]) -> Iterator[Stretch]:
        """Yields consecutive tokens of one kind; a token with a note is shown by itself, with the note after it."""
        special = np.isin(ids, self.control_ids)
        changes = np.flatnonzero((np.diff(supervised) | np.diff(special)) != 0) + 1
        borders = sorted({0, len(ids), *changes.tolist(), *notes, *(k + 1 for k in notes)})
        for start, stop in pairwise(borders):
            text = self.decode(ids[start:stop]) + (f"({notes[start]})" if start in notes else "")
            yield Stretch(text, bool(supervised[start]), bool(special[start]))


def _visible(text: str) -> str:
    """Returns a token without white space around it; white space alone as it is written in code."""
    return text.strip() or repr(text)[1:-1]


def _count_runs(types: npt.NDArray[np.int8]) -> tuple[tuple[int, int], ...]:
    borders = [0, *(np.flatnonzero(np.diff(types)) + 1).tolist(), len(types)]
    return tuple((int(types[start]), stop - start) for start, stop in pairwise(borders))


def _corruption(objective: ObjectiveConfig, tokenizer: Tokenizer, seed: int, longest: int) -> Corruption | None:
    vocab_size = len(is_special(tokenizer))
    target = Target(0)  # the first input of the decoder is not shown
    match objective:
        case Mlm():
            return Masking(objective, tokenizer, seed=seed, vocab_size=vocab_size)
        case Span(style="bart"):
            return Infilling(objective, tokenizer, target, seed=seed, vocab_size=vocab_size)
        case Span():
            return SpanCorruption(objective, tokenizer, target, seed=seed, max_length=longest)
    return None
