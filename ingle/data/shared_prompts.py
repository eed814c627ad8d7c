"""Shares the common start of the documents of a row, so that a model computes it once.

A row of several documents, such as a prompt with two answers, becomes a tree: a document with their common start, the
*root*, then one for the rest of each document. An answer begins with the last token of the common start, so that each
answer's first token is predicted by a token of its own: losses per document, labels and caches need no rule for trees.
The price is one token for each answer but the first.

    row        root (P - 1)      answer 1 (1 + A1)   answer 2 (1 + A2)
    position   0 ... P - 2       P - 1 ...           P - 1 ...
    offset     0                 1                   2                     (``parent_offsets``)

The column ``parent_offsets`` says how many documents before it the document is that each one continues; 0 for none.
Answers keep the order of the documents, and the columns that have a value per document.

Of an encoder-decoder, the source that several targets of a row read is kept once: the others are empty, and
``parent_offsets`` leads to the document whose source it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.batch import COLUMNS
from ingle.data.types import IGNORE_INDEX, Sample

_Values = npt.NDArray[Any]

#: Fewest shared tokens for which a tree is made: below it saves less than it costs.
AT_LEAST = 16


def share(samples: Sequence[Sample], *, at_least: int = AT_LEAST, supervised: bool = False) -> list[Sample]:
    """Returns samples in which the common start of the documents of each row is shared.

    Args:
        samples: Documents with ``group_ids``; adjacent ones with the same number are a row.
        at_least: Fewest tokens of a root; rows with less in common stay as they are.
        supervised: Whether tokens with labels are shared, too, for losses over prompts and answers
            (:meth:`ingle.data.batch.Batch.path_sums`). Otherwise the common start ends before the first label.

    Returns:
        Roots and answers, with the column ``parent_offsets``; the given samples if no row has enough in common.
    """
    rows = [list(row) for _, row in groupby(samples, key=_group)]
    if samples and "decoder_input_ids" in samples[0].columns:
        trees = [_share_source(row, at_least) for row in rows]
    else:
        trees = [_share_start(row, at_least, supervised) for row in rows]
    if not any(trees):
        return list(samples)
    return [sample for row, tree in zip(rows, trees, strict=True) for sample in tree or [_with(s, 0) for s in row]]


def _group(sample: Sample) -> int:
    assert "group_ids" in sample.columns, "documents that share a prompt need group_ids"
    return int(np.asarray(sample.columns["group_ids"]).item())


def _share_start(row: Sequence[Sample], at_least: int, supervised: bool) -> list[Sample]:
    """Returns the root and the answers of a row; nothing if it has too little in common."""
    shared = _common_tokens(row, supervised) - 1
    if len(row) < 2 or shared < at_least:
        return []
    root = _cut(row[0], slice(shared))
    of_root = {
        name: value for name, value in root.columns.items() if COLUMNS[name].per == "token" or name == "group_ids"
    }
    filled = {name: np.full_like(value, COLUMNS[name].fill) for name, value in root.columns.items()}
    tree = [_with(Sample(root.input_ids, root.labels, filled | of_root), 0)]
    for number, sample in enumerate(row, 1):
        answer = _cut(sample, slice(shared, None))
        if number > 1:  # the root predicts the last shared token, once
            answer.labels[0] = IGNORE_INDEX
        tree.append(_with(answer, number))
    return tree


def _common_tokens(row: Sequence[Sample], supervised: bool) -> int:
    """Returns how many tokens the documents begin with alike, in all columns that have a value per token."""
    length = min(len(sample.input_ids) for sample in row)
    first, *others = ([column[:length] for column in _token_columns(sample).values()] for sample in row)
    alike = np.ones(length, bool)
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            alike &= ours == theirs
    if not supervised:
        for sample in row:
            alike &= sample.labels[:length] == IGNORE_INDEX
    return length if alike.all() else int(alike.argmin())


def _token_columns(sample: Sample) -> Mapping[str, _Values]:
    columns = {name: value for name, value in sample.columns.items() if COLUMNS[name].per == "token"}
    return {"input_ids": sample.input_ids, "labels": sample.labels, **columns}


def _cut(sample: Sample, part: slice) -> Sample:
    """Returns copies of the tokens of a part."""
    tokens = {name: value[part].copy() for name, value in _token_columns(sample).items()}
    input_ids, labels = tokens.pop("input_ids"), tokens.pop("labels")
    return Sample(input_ids, labels, {**sample.columns, **tokens})


def _share_source(row: Sequence[Sample], at_least: int) -> list[Sample]:
    """Returns the pairs of a row without the sources that an earlier pair has; nothing if there is none."""
    pairs: list[Sample] = []
    owner = 0
    for number, sample in enumerate(row):
        source, kept = sample.input_ids, row[owner].input_ids
        if number > owner and len(source) >= at_least and np.array_equal(source, kept):
            empty = {
                name: value[:0] for name, value in _token_columns(sample).items() if not name.startswith("decoder_")
            }
            columns = {**sample.columns, **empty}
            pairs.append(_with(Sample(columns.pop("input_ids"), columns.pop("labels"), columns), number - owner))
        else:
            owner = number
            pairs.append(_with(sample, 0))
    return pairs if any(sample.columns["parent_offsets"].any() for sample in pairs) else []


def _with(sample: Sample, offset: int) -> Sample:
    return Sample(sample.input_ids, sample.labels, {**sample.columns, "parent_offsets": np.array([offset], np.int32)})
