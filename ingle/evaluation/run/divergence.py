"""Divergence of one model's predictions from those of a reference, token by token.

The reference model runs first, and its last hidden states are kept. Its logits are recomputed from them in chunks while
the other model runs. So only the logits of a few hundred tokens are in memory at once, and never both models.

Legend: N scored tokens, W windows, H hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle.data import IGNORE_INDEX, collate
from ingle.data.batch import Batch
from ingle.evaluation.run.windows import Window, pack_windows
from ingle.evaluation.statistics import Floats
from ingle.models import device_of, first_token, forward_hidden, head, kind_of
from ingle.models.forward.hidden_states import Head

#: Number of logits in a chunk, for each of the two models.
CHUNK_LOGITS = 1 << 23

#: Below this number of scored tokens, their mean is rough.
FEW_TOKENS = 1000

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Reference:
    """The data of the reference model that comparisons need.

    Attributes:
        hidden: Last hidden states of the scored tokens, one tensor per packed row.
        head: Its output layer.
    """

    hidden: tuple[Tensor, ...]
    head: Head


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence of a model from a reference: means over all scored tokens of a text.

    Attributes:
        kl: KL(reference || other) in nats per token.
        top1_agreement: Share of tokens for which both predict the same token.
        perplexity_first: Perplexity of the text under the reference.
        perplexity_second: Perplexity of the text under the other model.
        num_tokens: Number of compared tokens.
    """

    kl: float
    top1_agreement: float
    perplexity_first: float
    perplexity_second: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Predictions:
    """Figures of each scored token, in the order of :func:`pack_windows`.

    Attributes:
        window: Number of each token's window in that order, ``[N]``.
        nll: Negative log-likelihood of each token in nats, ``[N]``.
        reference_nll: The same under the reference, ``[N]``.
        kl: Kullback-Leibler divergence from the reference's prediction in nats, ``[N]``.
        agrees: Whether both predict the same token, ``[N]``.
    """

    window: npt.NDArray[np.int64]
    nll: Floats
    reference_nll: Floats
    kl: Floats
    agrees: npt.NDArray[np.bool_]

    def divergence(self) -> Divergence:
        """Returns the means over all tokens."""
        return Divergence(
            kl=float(self.kl.mean()),
            top1_agreement=float(self.agrees.mean()),
            perplexity_first=float(np.exp(self.reference_nll.mean())),
            perplexity_second=float(np.exp(self.nll.mean())),
            num_tokens=len(self.kl),
        )

    def by_window(self, values_N: npt.ArrayLike) -> Floats:
        """Returns the sum over the tokens of each window and their number, ``[W, 2]``."""
        counts = np.bincount(self.window)
        return np.stack([np.bincount(self.window, np.asarray(values_N, dtype=np.float64)), counts], axis=1)


@torch.no_grad()
def record_reference(
    model: Any, windows: Sequence[Window], on_progress: OnProgress = lambda done, total: None
) -> Reference:
    """Runs the reference model, in evaluation mode, and returns what comparisons with it need.

    The output layer is copied, since the other model may be this one, quantized in place.
    """
    hidden, done = [], 0
    for row in pack_windows(windows):
        states_NH, _, _ = _scored(model, row)
        hidden.append(states_NH)
        done += len(row)
        on_progress(done, len(windows))
    output = head(model)
    bias = None if output.bias is None else output.bias.detach().clone()
    kept = Head(output.weight.detach().clone(), bias, output.logit_scale, output.softcap)
    return Reference(tuple(hidden), kept)


@torch.no_grad()
def compare(
    model: Any, reference: Reference, windows: Sequence[Window], on_progress: OnProgress = lambda done, total: None
) -> Predictions:
    """Runs a model over the same windows and compares its prediction of every scored token.

    Args:
        model: A model in evaluation mode.
        reference: Result of :func:`record_reference` for the same windows.
        windows: At least one window.
        on_progress: Called with the number of finished windows and their total.
    """
    parts: list[tuple[Floats, Floats, Floats, npt.NDArray[np.bool_]]] = []
    places, done = [], 0
    output = head(model)
    for row, expected_NH in zip(pack_windows(windows), reference.hidden, strict=True):
        states_NH, targets_N, window_N = _scored(model, row)
        places.append(done + window_N.numpy())
        step = max(16, CHUNK_LOGITS // output.weight.shape[0])
        for start in range(0, len(targets_N), step):
            chunk = slice(start, start + step)
            theirs_CV = reference.head.logits(expected_NH[chunk]).float().log_softmax(-1)
            ours_CV = output.logits(states_NH[chunk]).float().log_softmax(-1)
            parts.append(_compare(theirs_CV, ours_CV, targets_N[chunk]))
        done += len(row)
        on_progress(done, len(windows))
    nll, reference_nll, kl, agrees = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Predictions(np.concatenate(places), nll, reference_nll, kl, agrees)


def _scored(model: Any, row: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the hidden states that predict scored tokens, these tokens, and their windows' numbers in the row."""
    batch = collate([window.sample for window in row]).to(device_of(model))
    targets_N = batch.next_labels()
    if kind_of(model.config) == "encoder_decoder":
        batch, targets_N = _repeat(model, batch), batch.labels[0]
    kept = targets_N != IGNORE_INDEX
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
    number_N = torch.repeat_interleave(torch.arange(len(row), device=lengths.device), lengths)
    return forward_hidden(model, batch)[0][kept], targets_N[kept], number_N[kept].cpu()


def _repeat(model: Any, batch: Batch) -> Batch:
    """Adds the texts as targets: an encoder-decoder reads each and predicts it token by token."""
    previous_N = batch.input_ids[0].roll(1)
    previous_N[batch.cu_seqlens[:-1].long()] = first_token(model)
    target = {"input_ids": previous_N[None], "position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens}
    return replace(batch, columns={**batch.columns, **{f"decoder_{name}": column for name, column in target.items()}})


def _compare(
    theirs_CV: Tensor, ours_CV: Tensor, targets_C: Tensor
) -> tuple[Floats, Floats, Floats, npt.NDArray[np.bool_]]:
    nll_C, reference_nll_C = (-logps_CV.gather(1, targets_C[:, None])[:, 0] for logps_CV in (ours_CV, theirs_CV))
    kl_C = (theirs_CV.exp() * (theirs_CV - ours_CV)).sum(-1)
    agrees_C = theirs_CV.argmax(-1) == ours_CV.argmax(-1)
    return (
        nll_C.double().cpu().numpy(),
        reference_nll_C.double().cpu().numpy(),
        kl_C.double().clamp_min(0).cpu().numpy(),  # rounding errors can be negative
        agrees_C.cpu().numpy(),
    )
