"""Examines preferences and judgements before a run: contradictions, noise, bias by length, cut answers, balance.

Everything is computed from the tokens that training reads, in one pass: about 50 bytes per answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.counters import GOLDEN, mix
from ingle.data.dataset import TokenDataset
from ingle.data.holdout import find_near, hash_tokens
from ingle.data.minhash import Hashes
from ingle.data.types import IGNORE_INDEX
from ingle.events import Progress, Sink
from ingle.report.data_results import Pair, PreferenceReport, Rate

#: With fewer pairs that were judged more than once, noise cannot be estimated.
_MIN_REPEATED = 30
#: Contradictions that a report shows.
_NUM_SHOWN = 5
#: Flip rate that the proposal for beta assumes where noise is unknown.
_USUAL_NOISE = 0.05
#: Drift from the reference per token of an answer, in nats, that the proposal for beta allows.
_DRIFT = 0.1
_LEAST_BETA, _LARGEST_BETA = 0.01, 0.5
#: The 97.5 % quantile of the normal distribution.
_Z95 = 1.959963984540054
_STAGE = "Examining answers"
_EVERY = 2048

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Answers:
    """The answers of a dataset.

    Attributes:
        documents: int64 [A], the document of each.
        rows: int64 [A], ascending.
        prompts: uint64 [A], hashes of prompts.
        answers: uint64 [A], hashes of answers.
        tokens: int64 [A], tokens of answers.
        scores: float32 [A].
        truncated: bool [A].
    """

    documents: Ints
    rows: Ints
    prompts: Hashes
    answers: Hashes
    tokens: Ints
    scores: npt.NDArray[np.float32]
    truncated: npt.NDArray[np.bool_]


def examine(dataset: TokenDataset, *, is_judged: bool, sink: Sink = lambda event: None) -> PreferenceReport:
    """Examines the answers of a dataset.

    Args:
        dataset: Documents with ``scores``.
        is_judged: Whether answers are good or bad, rather than compared with one another.
        sink: Receives progress.
    """
    found = _read(dataset, sink)
    better, worse = (np.zeros(0, np.int64),) * 2 if is_judged else _pair(found)
    good = found.scores > 0.5
    if is_judged:
        keys, says = _mix_keys(found.prompts, found.answers), good
        documents = found.documents
    else:
        one, two = found.answers[better], found.answers[worse]
        keys = _mix_keys(found.prompts[better], np.minimum(one, two), np.maximum(one, two))
        says, documents = one < two, found.documents[better]
    repeats = _find_repeats(keys, says)
    num_good = int(good.sum()) if is_judged else 0
    noise = _estimate_noise(repeats.disagreement)
    return PreferenceReport(
        rows=int(found.rows[-1]) + 1,
        prompts=len(np.unique(found.prompts)),
        answers=len(found.rows),
        pairs=len(better),
        near_prompts=_count_near(dataset, found, sink),
        ties=0 if is_judged else _count_ties(found, len(better)),
        good=num_good,
        bad=len(found.rows) - num_good if is_judged else 0,
        better_tokens=_mean(found.tokens[good] if is_judged else found.tokens[better]),
        worse_tokens=_mean(found.tokens[~good] if is_judged else found.tokens[worse]),
        better_truncated=int(found.truncated[good if is_judged else better].sum()),
        worse_truncated=int(found.truncated[~good if is_judged else worse].sum()),
        half_truncated=int((found.truncated[better] != found.truncated[worse]).sum()),
        longer_wins=_measure_length_bias(found, better, worse),
        repeated=len(repeats.disagreement),
        exact=repeats.exact,
        contradictory=repeats.contradictory,
        contradictions=tuple(
            Pair(dataset.origin(int(documents[i])), dataset.origin(int(documents[j])), 1.0) for i, j in repeats.shown
        ),
        noise=noise,
        beta=None if is_judged else _propose_beta(noise, _mean(found.tokens)),
    )


def _read(dataset: TokenDataset, sink: Sink) -> _Answers:
    scores, truncated = (dataset.document_column(name) for name in ("scores", "truncated"))
    groups = dataset.groups
    rows = (
        np.arange(len(dataset))
        if groups is None
        else np.repeat(np.arange(len(groups.offsets) - 1), np.diff(groups.offsets))
    )
    columns: list[tuple[int, int, int, int]] = []
    source = None
    for i in range(len(dataset)):
        if i % _EVERY == 0:
            sink(Progress(_STAGE, i, len(dataset)))
        sample = dataset.sample(i)
        if dataset.text_name(i) == "source":
            source = hash_tokens(sample.input_ids)
            continue
        answer = np.flatnonzero(sample.labels != IGNORE_INDEX)
        first = int(answer[0]) if source is None else 0
        prompt = hash_tokens(sample.input_ids[:first]) if source is None else source
        columns.append((i, prompt, hash_tokens(sample.input_ids[first:]), len(answer)))
    documents, prompts, answers, tokens = zip(*columns, strict=True)
    places = np.array(documents, np.int64)
    return _Answers(
        places,
        rows[places],
        np.array(prompts, np.uint64),
        np.array(answers, np.uint64),
        np.array(tokens, np.int64),
        scores[places],
        truncated[places].astype(np.bool_),
    )


def _pair(found: _Answers) -> tuple[Ints, Ints]:
    """Returns the better and the worse answer of every pair of a row with different scores, int64 [P] each."""
    better, worse = [], []
    starts = np.flatnonzero(np.diff(found.rows, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(found.rows)], strict=True):
        scores = found.scores[start:stop]
        one, two = np.nonzero(scores[:, None] > scores[None, :])
        better.append(one + start)
        worse.append(two + start)
    return np.concatenate(better), np.concatenate(worse)


def _count_near(dataset: TokenDataset, found: _Answers, sink: Sink) -> int:
    """Returns the prompts that are similar to an earlier one, but not equal."""
    prompt_of = dict(zip(found.documents.tolist(), found.prompts.tolist(), strict=True))
    step = int(found.documents[0])  # 1 if a source precedes every answer
    pairs = ((prompt_of[one + step], prompt_of[two + step]) for one, two in find_near(dataset, sink))
    return len({two for one, two in pairs if one != two})


def _count_ties(found: _Answers, num_pairs: int) -> int:
    """Returns the pairs of a row with equal scores."""
    sizes = np.bincount(found.rows).astype(np.int64)
    return int((sizes * (sizes - 1) // 2).sum()) - num_pairs


def _measure_length_bias(found: _Answers, better: Ints, worse: Ints) -> Rate | None:
    """Returns how often the longer answer is the better one; its interval counts prompts, not pairs."""
    longer, shorter = found.tokens[better], found.tokens[worse]
    differ = longer != shorter
    if not differ.any():
        return None
    return _rate(float((longer > shorter)[differ].mean()), len(np.unique(found.prompts[better][differ])))


@dataclass(frozen=True, slots=True)
class _Repeats:
    """What was judged more than once.

    Attributes:
        disagreement: float64 [K], the chance that two judgements of the same answers differ.
        exact: Judgements that repeat an earlier one.
        contradictory: Answers that were judged both ways.
        shown: The first judgement of each kind, for the first of these answers.
    """

    disagreement: npt.NDArray[np.float64]
    exact: int
    contradictory: int
    shown: list[tuple[int, int]]


def _find_repeats(keys: Hashes, says: npt.NDArray[np.bool_]) -> _Repeats:
    distinct, first, group = np.unique(keys, return_index=True, return_inverse=True)
    count = np.bincount(group, minlength=len(distinct)).astype(np.float64)
    agree = np.bincount(group, says, len(distinct))
    several = count > 1
    both = np.flatnonzero((agree > 0) & (agree < count))
    disagreement = 2 * agree * (count - agree) / np.maximum(count * (count - 1), 1)
    shown = []
    for k in both[np.argsort(first[both], kind="stable")][:_NUM_SHOWN].tolist():
        own = np.flatnonzero(group == k)
        one, two = int(own[says[own]][0]), int(own[~says[own]][0])
        shown.append((min(one, two), max(one, two)))
    return _Repeats(disagreement[several], len(keys) - len(distinct) - len(both), len(both), shown)


def _estimate_noise(disagreement: npt.NDArray[np.float64]) -> Rate | None:
    """Returns the rate of wrong judgements; None if too few were repeated.

    Two independent judgements, each wrong at the rate e, differ at the rate 2 e (1 - e).
    """
    count = len(disagreement)
    if count < _MIN_REPEATED:
        return None
    rate = _rate(float(disagreement.mean()), count)
    share, low, high = ((1 - math.sqrt(1 - 2 * min(d, 0.5))) / 2 for d in (rate.share, rate.low, rate.high))
    return Rate(share, low, high, count)


def _propose_beta(noise: Rate | None, mean_tokens: float) -> float:
    """Returns the beta at which smoothed DPO is at its optimum after a drift of 0.1 nats per token.

    With smoothing e, the loss is smallest where beta times the difference of log-ratios is log((1 - e) / e).
    """
    share = _USUAL_NOISE if noise is None else min(max(noise.share, 1e-3), 0.49)
    beta = math.log((1 - share) / share) / (_DRIFT * max(mean_tokens, 1.0))
    return min(max(beta, _LEAST_BETA), _LARGEST_BETA)


def _rate(share: float, count: int) -> Rate:
    """Returns a rate with its interval.

    Source: Wilson 1927, JASA 22:209, equation 4.
    """
    z2 = _Z95 * _Z95
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Rate(share, max(center - half, 0.0), min(center + half, 1.0), count)


def _mix_keys(*hashes: Hashes) -> Hashes:
    """Returns one hash for each position of several arrays; their order counts."""
    mixed = np.zeros(len(hashes[0]), np.uint64)
    for each in hashes:
        mixed = mix(mixed ^ each) + np.uint64(GOLDEN)
    return mixed


def _mean(values: npt.NDArray[Any] | Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
