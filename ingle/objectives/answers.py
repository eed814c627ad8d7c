"""The answers of a micro-batch: their tokens, sums over them, and the pairs that they make.

Legend: N tokens of the row of targets, M supervised tokens, D documents, T tokens of the longest answer, P pairs.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from ingle.config.preferences import PairChoice
from ingle.data.batch import Batch
from ingle.data.types import IGNORE_INDEX
from ingle.kernels.layers.divergence import Predictions, linear_divergence
from ingle.kernels.layers.logits import LogitTransform
from ingle.kernels.layers.token_statistics import token_statistics
from ingle.models import Head, Model, forward_hidden, through_head
from ingle.objectives.token_loss import head_logps


class AnswerTokens(NamedTuple):
    """The supervised tokens of a micro-batch.

    Attributes:
        targets: The token that each position predicts, int64 [N]; ``IGNORE_INDEX`` where there is none.
        rows: The positions that predict one, ascending, int64 [M].
        documents: Their documents, int64 [M].
        places: Their places among the supervised tokens of their document, from 0, int64 [M].
        lengths: Supervised tokens of each document, int64 [D].
    """

    targets: Tensor
    rows: Tensor
    documents: Tensor
    places: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: Batch) -> AnswerTokens:
        """Finds them; of an encoder-decoder, in the decoder's row."""
        is_decoder = "decoder_labels" in batch.columns
        targets_N = batch.columns["decoder_labels"][0] if is_decoder else batch.next_labels()
        bounds = batch.columns["decoder_cu_seqlens"] if is_decoder else batch.cu_seqlens
        rows_M = torch.nonzero(targets_N != IGNORE_INDEX).flatten()
        documents_M = torch.searchsorted(bounds[1:].long(), rows_M, right=True)
        lengths_D = torch.bincount(documents_M, minlength=len(bounds) - 1)
        firsts_D = lengths_D.cumsum(0) - lengths_D
        places_M = torch.arange(len(rows_M), device=rows_M.device) - firsts_D[documents_M]
        return cls(targets_N, rows_M, documents_M, places_M, lengths_D)

    def by_document(self, values_M: Tensor) -> Tensor:
        """Returns the values of each document in a row of its own, 0 behind its end, [D, T].

        Differentiable, and summed over a row in the same order on every device.
        """
        longest = int(self.lengths.max()) if len(self.rows) else 1
        return values_M.new_zeros(len(self.lengths), longest).index_put((self.documents, self.places), values_M)


def answer_logps(model: Model, batch: Batch, targets_N: Tensor) -> Tensor:
    """Returns the log-probability of each target, [N]; 0 where there is none."""
    return through_head(model, head_logps, forward_hidden(model, batch)[0], targets_N)


class Statistics(NamedTuple):
    """Figures of each target, [N]; 0 where there is none. Only the log-probabilities are differentiable.

    Attributes:
        logps: Log-probabilities, in nats.
        entropies: Entropies of the distributions that they come from, in nats.
        log_squares: Logarithms of the sums of the squared probabilities.
    """

    logps: Tensor
    entropies: Tensor
    log_squares: Tensor


def answer_statistics(model: Model, batch: Batch, targets_N: Tensor) -> Statistics:
    """Returns the log-probability of each target, and what the distribution looks like."""
    logps_N, *others = through_head(model, describe_targets, forward_hidden(model, batch)[0], targets_N)
    return Statistics(logps_N, *(other.detach() for other in others))


def describe_targets(output: Head, hidden_NH: Tensor, targets_N: Tensor, *, with_entropies: bool = False) -> Tensor:
    """Returns :class:`Statistics` as one tensor, [3, N].

    Args:
        output: The output layer.
        hidden_NH: Last hidden states.
        targets_N: Token ids.
        with_entropies: Whether gradients flow through the entropies, too.
    """
    found = token_statistics(
        hidden_NH,
        output.weight,
        targets_N,
        bias=output.bias,
        logit_scale=output.logit_scale,
        softcap=output.softcap,
        with_entropies=with_entropies,
    )
    return torch.stack(found)


def answer_divergences(model: Model, batch: Batch, targets_N: Tensor, states_NH: Tensor) -> tuple[Statistics, Tensor]:
    """Returns :func:`answer_statistics`, and ``KL(reference || model)`` where each target is predicted, [N], in nats.

    Args:
        model: The model.
        batch: The tokens.
        targets_N: Token ids.
        states_NH: Last hidden states of the reference, which has the same output layer.
    """
    function = partial(_describe_both, states_NH)
    found = through_head(model, function, forward_hidden(model, batch)[0], targets_N)
    logps_N, entropies_N, squares_N, divergences_N = found
    return Statistics(logps_N, entropies_N.detach(), squares_N.detach()), divergences_N


def _describe_both(states_NH: Tensor, output: Head, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    divergences_N = _compare_states(states_NH, 0.0, output, hidden_NH, targets_N)
    return torch.cat([describe_targets(output, hidden_NH, targets_N), divergences_N[None]])


def _compare_states(states_NH: Tensor, beta: float, output: Head, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    transform = LogitTransform(output.logit_scale, output.softcap)
    own, other = (Predictions(states, output.weight, output.bias, transform) for states in (hidden_NH, states_NH))
    return linear_divergence(own, other, targets_N, beta=beta)


def reverse_divergences(model: Model, batch: Batch, targets_N: Tensor, states_NH: Tensor) -> Tensor:
    """Returns ``KL(model || reference)`` where each target is predicted, [N], in nats; see :func:`answer_divergences`.

    The sum over an answer is the divergence along this text, not that of whole answers.
    """
    divergences_N: Tensor = through_head(
        model, partial(_compare_states, states_NH, 1.0), forward_hidden(model, batch)[0], targets_N
    )
    return divergences_N


def reference_states(batch: Batch) -> Tensor:
    """Returns the last hidden states of the reference, [N, H], in the row that is predicted."""
    return batch.columns["reference_states"][0]


def with_reference(logps_N: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Returns the column of the reference's log-probabilities, each at the position of its token."""
    if "decoder_labels" in batch.columns:
        return {"decoder_reference_logps": logps_N[None]}
    return {"reference_logps": logps_N.roll(1)[None]}


def log_ratios(logps_M: Tensor, batch: Batch, tokens: AnswerTokens) -> Tensor:
    """Returns ``log p - log p of the reference`` of each supervised token, [M]."""
    if "decoder_labels" in batch.columns:
        return logps_M - batch.columns["decoder_reference_logps"][0][tokens.rows]
    return logps_M - batch.columns["reference_logps"][0].roll(-1)[tokens.rows]


class Pairs(NamedTuple):
    """Pairs of answers of the same row.

    Attributes:
        chosen: Documents, int64 [P].
        rejected: Documents, int64 [P].
        weights: 1 divided by the pairs of the row, so that every row counts once, float32 [P].
        best: The best answer of each row that has a pair, int64.
        margins: Differences of the scores, float32 [P].
    """

    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    best: Tensor
    margins: Tensor


def find_pairs(batch: Batch, documents_D: Tensor, choice: PairChoice) -> Pairs:
    """Returns the pairs of a micro-batch, by the scores of answers; equal scores make none.

    Args:
        batch: With ``group_ids`` and ``scores``.
        documents_D: Whether a document is an answer that counts, bool [D].
        choice: Which pairs of a row.
    """
    counts = documents_D.tolist()
    answers = [document for document in batch.answers().tolist() if counts[document]]
    groups, scores = batch.columns["group_ids"].tolist(), batch.columns["scores"].tolist()
    found: list[tuple[int, int, float]] = []
    best = []
    for _, row in groupby(answers, key=lambda document: groups[document]):
        ranked = sorted(row, key=lambda document: -scores[document])
        match choice:
            case "all":
                pairs = product(ranked, ranked)
            case "neighbours":
                pairs = pairwise(ranked)  # type: ignore[assignment]
            case "best_worst":
                pairs = iter([(ranked[0], ranked[-1])])  # type: ignore[assignment]
        kept = [(one, other) for one, other in pairs if scores[one] > scores[other]]
        found += [(one, other, 1 / len(kept)) for one, other in kept]
        best += ranked[:1] if kept else []
    device = batch.cu_seqlens.device
    chosen, rejected = (torch.tensor([pair[side] for pair in found], dtype=torch.int64) for side in (0, 1))
    margins = [scores[one] - scores[other] for one, other, _ in found]
    return Pairs(
        chosen.to(device),
        rejected.to(device),
        torch.tensor([weight for _, _, weight in found], device=device),
        torch.tensor(best, dtype=torch.int64, device=device),
        torch.tensor(margins, device=device),
    )
