"""Rows that occur twice, exactly or nearly, and held-out rows that training has seen.

Texts are compared after folding case, Unicode variants and white space.  All hashes are fixed functions, so a
report is the same on every machine.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ingle.data.dataset import Origins
from ingle.data.types import Example, last_answer

Hashes = npt.NDArray[np.uint64]

#: Words of a shingle: near duplicates are told by the share of word triples two texts have in common.
SHINGLE_WORDS = 3
#: Texts with at least this Jaccard similarity of their shingles are near duplicates.
NEAR = 0.8
#: Near duplicates are looked for among at most so many rows, evenly spaced.
MAX_COMPARED = 50_000
#: Words of the n-grams that held-out answers and training answers are compared by.
NGRAM_WORDS = 8

# 16 bands of 4 rows find a pair of similarity 0.8 with probability 1 - (1 - 0.8^4)^16 > 0.9997.
_BANDS, _BAND_ROWS = 16, 4
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows, by ``file:line``, and their similarity from 0 to 1."""

    first: str
    second: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What is said more than once.

    Attributes:
        rows: Looked at.
        exact: Rows equal to an earlier one.
        exact_pairs: The first of them.
        same_prompt: Rows whose prompt occurred earlier with another answer.
        compared: Distinct rows among which near duplicates were looked for.
        near: Of these, rows much like an earlier one.
        near_pairs: The most similar of them.
    """

    rows: int
    exact: int
    exact_pairs: tuple[Pair, ...]
    same_prompt: int
    compared: int
    near: int
    near_pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Contamination:
    """Held-out rows that training contains as well.

    Attributes:
        rows: Held-out rows.
        same_prompt: Whose prompt occurs in training.
        same_row: Whose prompt and answer do.
        pairs: The first of them, held-out row and training row.
    """

    rows: int
    same_prompt: int
    same_row: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Overlap(Contamination):
    """Contamination, and how many of the words of held-out answers occur in training.

    Attributes:
        ngram_words: Words of the n-grams compared.
        answers: Held-out answers long enough for one n-gram.
        ngram_share: Mean share of their n-grams that occur in training answers.
        half_seen: Answers with at least half of their n-grams in training answers.
    """

    ngram_words: int
    answers: int
    ngram_share: float
    half_seen: int


def fold(text: str) -> str:
    """Text without differences of case, Unicode form and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_parts(example: Example) -> tuple[str, str]:
    """Folded prompt and answer; of plain text, nothing and all of it."""
    if example.text is not None:
        return "", fold(example.text)
    if example.prompt is not None:
        return fold(example.prompt), fold(example.completion or "")
    turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    return fold("\n".join(turn.content for turn in turns)), fold(last_answer(example) or "")


def find_duplicates(examples: Iterable[Example], *, num_shown: int = 5) -> Duplicates:
    """Exact and near duplicates among rows, looked at in order."""
    seen: dict[bytes, int] = {}
    prompts: dict[bytes, int] = {}
    origins = Origins()
    distinct: list[int] = []
    texts: list[str] = []
    exact_pairs: list[Pair] = []
    exact = same_prompt = rows = 0
    for i, example in enumerate(examples):
        rows += 1
        origins.append(example.origin)
        prompt, answer = read_parts(example)
        first = seen.setdefault(_digest(prompt, answer), i)
        if first != i:
            exact += 1
            if len(exact_pairs) < num_shown:
                exact_pairs.append(Pair(origins.at(first), example.origin, 1.0))
            continue
        same_prompt += bool(prompt) and prompts.setdefault(_digest(prompt), i) != i
        distinct.append(i)
        texts.append(f"{prompt} {answer}")
    step = max(1, -(-len(texts) // MAX_COMPARED))
    near = sorted(_find_near(texts[::step]), key=lambda pair: (-pair[2], pair[0], pair[1]))
    places = distinct[::step]
    return Duplicates(
        rows=rows,
        exact=exact,
        exact_pairs=tuple(exact_pairs),
        same_prompt=same_prompt,
        compared=len(places),
        near=len({second for _, second, _ in near}),
        near_pairs=tuple(Pair(origins.at(places[a]), origins.at(places[b]), s) for a, b, s in near[:num_shown]),
    )


def find_contamination(
    training: Iterable[Example], held_out: Sequence[Example], *, num_shown: int = 5
) -> Contamination:
    """Which held-out rows training contains; remembers the held-out rows only."""
    parts = [read_parts(example) for example in held_out]
    wanted = {_digest(prompt or answer) for prompt, answer in parts}
    prompts: dict[bytes, str] = {}
    rows: set[bytes] = set()
    for example in training:
        prompt, answer = read_parts(example)
        asked = _digest(prompt or answer)
        if asked in wanted:
            prompts.setdefault(asked, example.origin)
            rows.add(_digest(prompt, answer))
    seen = [
        (example, prompts[_digest(prompt or answer)], _digest(prompt, answer) in rows)
        for example, (prompt, answer) in zip(held_out, parts, strict=True)
        if _digest(prompt or answer) in prompts
    ]
    return Contamination(
        rows=len(held_out),
        same_prompt=len(seen),
        same_row=sum(same for _, _, same in seen),
        pairs=tuple(Pair(example.origin, origin, 1.0) for example, origin, _ in seen[:num_shown]),
    )


def find_overlap(training: Iterable[Example], held_out: Sequence[Example], *, num_shown: int = 5) -> Overlap:
    """What of the held-out rows training contains, and how much of their answers."""
    grams: list[Hashes] = []

    def noted() -> Iterator[Example]:
        for example in training:
            grams.append(_hash_grams(read_parts(example)[1], NGRAM_WORDS))
            yield example

    found = find_contamination(noted(), held_out, num_shown=num_shown)
    known = np.unique(np.concatenate(grams)) if grams else np.zeros(0, dtype=np.uint64)
    answers = (_hash_grams(read_parts(example)[1], NGRAM_WORDS) for example in held_out)
    shares = [_share_known(own, known) for own in answers if len(own)]
    return Overlap(
        rows=found.rows,
        same_prompt=found.same_prompt,
        same_row=found.same_row,
        pairs=found.pairs,
        ngram_words=NGRAM_WORDS,
        answers=len(shares),
        ngram_share=float(np.mean(shares)) if shares else 0.0,
        half_seen=sum(share >= 0.5 for share in shares),
    )


def _share_known(hashes: Hashes, known: Hashes) -> float:
    """Share of hashes that occur in an ascending array."""
    if not len(known):
        return 0.0
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return float((known[places] == hashes).mean())


def _digest(*parts: str) -> bytes:
    return blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _hash_grams(text: str, size: int) -> Hashes:
    """Hashes of all runs of ``size`` words."""
    words = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text)], np.uint64)
    count = len(words) - size + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(size):
        grams = _mix(grams ^ words[i : i + count])
    return grams


def _mix(x: Hashes) -> Hashes:
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(29))


def _hash_shingles(text: str) -> Hashes:
    size = min(SHINGLE_WORDS, max(len(_WORD.findall(text)), 1))
    return np.unique(_hash_grams(text, size))


def _find_near(texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Pairs (earlier, later, similarity) of near duplicates; each later text at most once.

    MinHash signatures fall into bands; texts that agree in a band are compared by their true similarity with
    the first and the latest text of that band, which keeps the work linear.

    Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman,
    "Mining of Massive Datasets", section 3.4.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    num_hashes = _BANDS * _BAND_ROWS
    factors = rng.integers(0, 2**63, (num_hashes, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = rng.integers(0, 2**63, (num_hashes, 1), dtype=np.uint64)
    shingles = [_hash_shingles(text) for text in texts]
    buckets: dict[tuple[int, bytes], tuple[int, int]] = {}
    for i, own in enumerate(shingles):
        if not len(own):
            continue
        signature = ((factors * own + shifts) >> np.uint64(32)).min(axis=1)
        candidates: set[int] = set()
        for band in range(_BANDS):
            key = (band, signature[band * _BAND_ROWS : (band + 1) * _BAND_ROWS].tobytes())
            first, latest = buckets.get(key, (i, i))
            candidates |= {first, latest} - {i}
            buckets[key] = (first, i)
        scored = [(_compare(shingles[j], own), -j) for j in candidates]
        if scored and max(scored)[0] >= NEAR:
            similarity, j = max(scored)
            yield -j, i, similarity


def _compare(a: Hashes, b: Hashes) -> float:
    """Jaccard similarity of two ascending sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
