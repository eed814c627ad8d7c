"""Log-likelihoods of references under teacher forcing, token by token.

Legend: N tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ingle.data import IGNORE_INDEX, ControlTokens, Sample, Tokenizer, collate
from ingle.data.encoding import Document
from ingle.evaluation.run.windows import cut_windows, draw_scored_document, pack_windows, window_size
from ingle.evaluation.scorers import Likelihood
from ingle.evaluation.tasks.samples import TaskSample
from ingle.models import device_of, forward_hidden, through_head
from ingle.objectives.token_loss import head_logps


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
    """Returns the likelihood of each sample's first reference.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer.
        samples: Samples of the task.
        system: System message for conversations that have none.
        control: How control tokens in messages are read; as text by default.
        on_progress: Called with the number of finished windows and their total.
        on_cut: Called with the number of prompts that were cut at the start to fit the model.

    Raises:
        EvaluationError: A reference has no token to score.
        DataError: The chat template cannot be used.
    """
    if not samples:
        return ()
    control = control or ControlTokens(tokenizer)
    documents = [draw_scored_document(sample.example, tokenizer, system, control) for sample in samples]
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


def _scored_text(document: Document) -> str:
    """Returns the reference as rendered by the template, without the end of turn."""
    if document.answers is None:
        return document.text
    return "".join(document.text[answer.start : answer.content_end] for answer in document.answers)


def _score_row(model: Any, samples: Sequence[Sample]) -> list[tuple[float, int]]:
    """Returns negative log-likelihood and number of scored tokens of each window of a packed row."""
    batch = collate(samples).to(device_of(model))
    hidden_NH = forward_hidden(model, batch)[0]
    targets_N = batch.next_labels()
    logps_N = through_head(model, head_logps, hidden_NH, targets_N).double()
    bounds = batch.cu_seqlens.tolist()
    return [
        (-float(logps_N[start:end].sum()), int((targets_N[start:end] != IGNORE_INDEX).sum()))
        for start, end in pairwise(bounds)
    ]
