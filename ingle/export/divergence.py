"""How far one model's answers are from another's on the same text: divergence, agreement and perplexity.

The first model is let go before the second is opened: of it only the last hidden states and the output head are kept,
from which its probabilities are computed again when the second's are there.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ingle import data, models
from ingle.config.data import DataConfig
from ingle.data import IGNORE_INDEX, Sample
from ingle.models import Head

#: Tokens that are compared, at most.
MAX_TOKENS = 8192
#: Longest document; longer ones are cut.
MAX_LENGTH = 1024
#: Logits held at once.
_CHUNK_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two models on the same text; only tokens that carry loss are counted.

    Attributes:
        kl: Mean KL(first || second), nats a token.
        top1_agreement: Share of tokens where both find the same one likeliest.
        perplexity_first: Of the text under the first model.
        perplexity_second: Of the text under the second.
        num_tokens: Tokens compared.
    """

    kl: float
    top1_agreement: float
    perplexity_first: float
    perplexity_second: float
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Outlook:
    """What a model thinks of a text: enough to compute its probabilities again.

    Attributes:
        hidden_NH: Last hidden states of the tokens that predict a counted one.
        head: The output head.
        targets_N: The counted tokens.
    """

    hidden_NH: Tensor
    head: Head
    targets_N: Tensor


def read_samples(
    config: DataConfig, tokenizer: Any, objective: Any, *, window: int, max_tokens: int = MAX_TOKENS
) -> list[Sample]:
    """The first documents of some sources, tokenized as training does, up to a number of tokens."""
    limited = config.model_copy(
        update={
            "max_seq_len": min(window, MAX_LENGTH),
            "sources": tuple(
                source.model_copy(update={"limit": min(source.limit or 512, 512)}) for source in config.sources
            ),
        }
    )
    dataset = data.build_dataset(limited, tokenizer, objective=objective)
    samples: list[Sample] = []
    total = 0
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        if samples and total + len(sample.input_ids) > max_tokens:
            break
        samples.append(sample)
        total += len(sample.input_ids)
    return samples


@torch.no_grad()
def look(model: Any, samples: Sequence[Sample], *, row_tokens: int = 2048) -> Outlook:
    """Runs a model over samples, some in a row, none seeing another."""
    output = models.head(model)
    device = output.weight.device
    hidden, targets = [], []
    row: list[Sample] = []
    for sample in (*samples, None):
        if sample is None or (row and sum(len(s.input_ids) for s in row) + len(sample.input_ids) > row_tokens):
            batch = data.collate(row).to(device)
            labels = torch.full_like(batch.labels[0], IGNORE_INDEX)
            labels[:-1] = batch.labels[0, 1:]
            kept = labels != IGNORE_INDEX
            hidden.append(models.forward_hidden(model, batch)[0][kept])
            targets.append(labels[kept])
            row = []
        if sample is not None:
            row.append(sample)
    return Outlook(torch.cat(hidden), output, torch.cat(targets))


@torch.no_grad()
def compare(first: Outlook, second: Outlook) -> Divergence:
    """KL, agreement and perplexities of two models that looked at the same samples."""
    assert torch.equal(first.targets_N, second.targets_N), "two different texts"
    size = max(1, _CHUNK_LOGITS // first.head.weight.shape[0])
    kl = agreed = nll_first = nll_second = 0.0
    for start in range(0, len(first.targets_N), size):
        part = slice(start, start + size)
        logps = [_logps(each, part) for each in (first, second)]
        targets = first.targets_N[part, None]
        kl += float((logps[0].exp() * (logps[0] - logps[1])).sum(dtype=torch.float64))
        agreed += int((logps[0].argmax(-1) == logps[1].argmax(-1)).sum())
        nll_first -= float(logps[0].gather(-1, targets).sum(dtype=torch.float64))
        nll_second -= float(logps[1].gather(-1, targets).sum(dtype=torch.float64))
    count = len(first.targets_N)
    return Divergence(kl / count, agreed / count, math.exp(nll_first / count), math.exp(nll_second / count), count)


def _logps(outlook: Outlook, part: slice) -> Tensor:
    hidden = outlook.hidden_NH[part].to(outlook.head.weight.dtype)
    return outlook.head.logits(hidden).float().log_softmax(-1)
