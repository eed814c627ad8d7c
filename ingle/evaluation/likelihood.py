"""Teacher-forced log-likelihoods: how probable a model finds the reference, token by token.

What is scored of an answer is exactly what ``sft`` trains: its tokens and the end of turn, given the prompt, through
the same template and mask.  So held-out perplexity is ``exp`` of the training loss on the same rows.  Of plain text
every token is scored, the first one given the token that opens a text.

A document longer than the model reads is cut into windows; each begins with the last token of the one before, so
every token is scored once.

Legend: N tokens of a packed row, T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ingle.data import IGNORE_INDEX, ControlTokens, Example, Sample, Tokenizer, collate
from ingle.data.encoding import Document, Encoded, TextEncoder, make_document
from ingle.data.types import Ids
from ingle.errors import EvaluationError
from ingle.evaluation.scorers import Likelihood
from ingle.evaluation.task import TaskSample
from ingle.kernels.layers.token_logps import token_logps
from ingle.models import forward_hidden, head

Mask = npt.NDArray[np.bool_]

#: Longest window; longer ones cost memory and change the figures little.
MAX_WINDOW = 2048

#: Tokens of one packed forward pass.
ROW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document that the model reads at once.

    Attributes:
        index: Of the document.
        sample: Its tokens, with labels where they are scored.
    """

    index: int
    sample: Sample


@torch.no_grad()
def score_references(
    model: Any,
    tokenizer: Tokenizer,
    samples: Sequence[TaskSample],
    *,
    system: str | None = None,
    control: ControlTokens | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_cut: Callable[[int], None] = lambda count: None,
) -> tuple[Likelihood, ...]:
    """The likelihood of each sample's first reference.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer.
        samples: Of the task.
        system: A system message put before conversations that have none.
        control: What to do with control tokens in messages; by default they are read as text.
        on_progress: Called with the number of finished windows and that of all.
        on_cut: Called with the number of prompts that were cut at the start to fit the model.

    Raises:
        EvaluationError: A reference gives no token to score.
        DataError: The chat template cannot be used.
    """
    control = control or ControlTokens(tokenizer)
    documents = [scorable(sample.example, tokenizer, system, control) for sample in samples]
    windows, cut = cut_windows(documents, tokenizer, window_size(model))
    if cut:
        on_cut(cut)
    nll, tokens = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
    done = 0
    for row in pack_windows(windows):
        for window, (total, count) in zip(row, _score_row(model, [window.sample for window in row]), strict=True):
            nll[window.index] += total
            tokens[window.index] += count
        done += len(row)
        on_progress(done, len(windows))
    return tuple(
        Likelihood(float(total), int(count), len(_scored_text(document).encode()))
        for total, count, document in zip(nll, tokens, documents, strict=True)
    )


def window_size(model: Any) -> int:
    """Most tokens scored in one pass over one document."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return min(limit, MAX_WINDOW) if isinstance(limit, int) and limit > 1 else MAX_WINDOW


def scorable(
    example: Example, tokenizer: Tokenizer, system: str | None = None, control: ControlTokens | None = None
) -> Document:
    """The document whose reference, or whose whole text, is scored.

    Raises:
        EvaluationError: The row gives nothing to score.
        DataError: The chat template cannot be used.
    """
    document = make_document(example, tokenizer, train_on="last", system=system, control=control)
    if isinstance(document, str):
        raise EvaluationError(
            "A task row has nothing whose likelihood could be scored.", where=example.origin, why=document
        )
    return document


def cut_windows(documents: Sequence[Document], tokenizer: Tokenizer, size: int) -> tuple[list[Window], int]:
    """Pieces of at most ``size`` tokens of all documents, and how many prompts were cut at the start.

    Raises:
        EvaluationError: A document has no token to score.
    """
    windows: list[Window] = []
    cut = 0
    for index, encoded in enumerate(TextEncoder(tokenizer).encode(documents)):
        pieces, was_cut = _windows(*_scored(encoded, documents[index], tokenizer), size, documents[index])
        windows += [Window(index, piece) for piece in pieces]
        cut += was_cut
    return windows, cut


def _scored_text(document: Document) -> str:
    """The reference as it stands in the rendered text, without the end of turn."""
    if document.answers is None:
        return document.text
    return "".join(document.text[answer.start : answer.content_end] for answer in document.answers)


def _scored(encoded: Encoded, document: Document, tokenizer: Tokenizer) -> tuple[Ids, Mask]:
    """Ids and which of them are scored; plain text gets an opening token and loses its closing one."""
    ids, scored = encoded.ids, encoded.supervised
    if document.answers is not None:
        return ids, scored
    if tokenizer.eos_token_id is not None:
        ids = ids[:-1]
    opening: int | None = tokenizer.bos_token_id
    if opening is None:
        opening = tokenizer.eos_token_id
    if opening is not None and (len(ids) == 0 or ids[0] != opening):
        ids = np.concatenate((np.array([opening], dtype=np.int32), ids))
    scored = np.ones(len(ids), dtype=np.bool_)
    scored[:1] = False
    return ids, scored


def _windows(ids_T: Ids, scored_T: Mask, size: int, document: Document) -> tuple[list[Sample], bool]:
    """Pieces of a document that the model can read, and whether its prompt was cut at the start."""
    places = np.flatnonzero(scored_T)
    if not len(places):
        raise EvaluationError("A task row's reference has no token to score.", where=document.origin)
    ids_T, scored_T = ids_T[: places[-1] + 1], scored_T[: places[-1] + 1]
    labels_T = np.where(scored_T, ids_T, IGNORE_INDEX).astype(np.int32)
    if len(ids_T) <= size:
        return [Sample(ids_T, labels_T)], False
    start, cut = 0, False
    if document.answers is not None:  # as much of the prompt as leaves room for the answer, or for half a window
        start = max(len(ids_T) - size, 0) if len(ids_T) - places[0] < size else max(int(places[0]) - size // 2, 0)
        cut = start > 0
    pieces = []
    while start < len(ids_T) - 1:
        piece, labels = ids_T[start : start + size], labels_T[start : start + size].copy()
        labels[0] = IGNORE_INDEX  # scored by the window before, or part of the prompt
        pieces.append(Sample(piece, labels))
        start += size - 1
    return pieces, cut


def pack_windows(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of like length together, at most :data:`ROW_TOKENS` tokens a row unless one alone is longer."""
    row: list[Window] = []
    num_tokens = 0
    for window in sorted(windows, key=lambda window: (len(window.sample.input_ids), window.index)):
        length = len(window.sample.input_ids)
        if row and num_tokens + length > ROW_TOKENS:
            yield row
            row, num_tokens = [], 0
        row.append(window)
        num_tokens += length
    if row:
        yield row


def _score_row(model: Any, samples: Sequence[Sample]) -> list[tuple[float, int]]:
    """Negative log-likelihood and number of scored tokens of each document of one packed row."""
    output = head(model)
    batch = collate(samples).to(output.weight.device)
    hidden_NH = forward_hidden(model, batch)[0]
    targets_N = batch.next_labels()
    logps_N = token_logps(
        hidden_NH,
        output.weight,
        targets_N,
        bias=output.bias,
        logit_scale=output.logit_scale,
        softcap=output.softcap,
    ).double()
    bounds = batch.cu_seqlens.tolist()
    return [
        (-float(logps_N[start:end].sum()), int((targets_N[start:end] != IGNORE_INDEX).sum()))
        for start, end in pairwise(bounds)
    ]
