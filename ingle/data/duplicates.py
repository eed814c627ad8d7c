"""Finds rows that repeat earlier ones, exactly or nearly, and held-out rows that are in the training data.

Texts are compared after folding case, Unicode variants and white space. All hashes are fixed functions, so results are
the same on every machine.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingle.data.dataset import GrowingArray, Origins
from ingle.data.minhash import NEAR, Hashes, find_candidates, jaccard, sign
from ingle.data.row_parts import fold as fold
from ingle.data.row_parts import read_parts, read_shared
from ingle.data.types import Example
from ingle.report.data_results import Contamination, Duplicates, Overlap, Pair

#: Words of a shingle; near duplicates share most of their shingles.
SHINGLE_WORDS = 3
#: At most this many rows, evenly spaced, are compared for near duplicates.
MAX_COMPARED = 50_000
#: At most this many characters of them are kept, if they are more than one row.
MAX_CHARS = 1 << 26
#: Words of the n-grams in which held-out answers and training answers are compared.
NGRAM_WORDS = 8
#: Pairs that a result shows.
_NUM_SHOWN = 5

_NUM_PARTS = 32  # a power of two
_WORD = re.compile(r"\w+|[^\w\s]")


class DuplicateSearch:
    """Finds exact and near duplicates among the rows that are added, in order.

    Keeps two hashes of every row (16 bytes), its line if it is added by itself (4 bytes), and the texts of the rows
    that are compared for near duplicates: every ``step``-th row, with a power of two that grows with the number of rows
    and the length of texts.

    Attributes:
        step: Distance between rows that are compared for near duplicates.
    """

    def __init__(self, num_shown: int = _NUM_SHOWN) -> None:
        self._num_shown = num_shown
        self._origins = Origins()
        self._parts: list[tuple[int, Callable[[int], str]]] = []  # first row, and the origins of rows from there on
        self._rows, self._prompts = GrowingArray(np.uint64), GrowingArray(np.uint64)
        self.step = 1
        self._texts: dict[int, str] = {}
        self._num_chars = 0

    def add(self, example: Example) -> None:
        """Adds a row."""
        self._origins.append(example.origin)
        prompt, answer = read_parts(example)
        i = self._rows.append(_key(prompt, answer))
        self._prompts.append(_key(prompt) if prompt else 0)
        if i % self.step == 0:
            self.add_text(i, example)

    def add_keys(self, prompts: Hashes, rows: Hashes, origin: Callable[[int], str]) -> None:
        """Adds rows by their hashes, see :class:`RowKeys`; :meth:`add_text` then adds the texts to compare.

        Args:
            prompts: uint64 [R].
            rows: uint64 [R].
            origin: Returns ``file:line`` of one of these rows.
        """
        self._parts.append((len(self._rows.view()), origin))
        self._prompts.extend(prompts)
        self._rows.extend(rows)
        while len(self._rows.view()) > self.step * MAX_COMPARED:
            self.step *= 2

    def add_text(self, i: int, example: Example) -> None:
        """Adds the text of row ``i``, if it is still one of those to compare."""
        if i % self.step:
            return
        self._texts[i] = text = " ".join(read_parts(example))
        self._num_chars += len(text)
        while len(self._texts) > MAX_COMPARED or (self._num_chars > MAX_CHARS and len(self._texts) > 1):
            self._thin_out()

    @property
    def num_texts(self) -> int:
        """Number of rows whose texts are compared."""
        return len(self._texts)

    def _origin(self, i: int) -> str:
        if not self._parts:
            return self._origins.at(i)
        first, origin = self._parts[bisect_right(self._parts, i, key=lambda part: part[0]) - 1]
        return origin(i - first)

    def _thin_out(self) -> None:
        self.step *= 2
        self._texts = {i: text for i, text in self._texts.items() if i % self.step == 0}
        self._num_chars = sum(map(len, self._texts.values()))

    def result(self) -> Duplicates:
        """Compares the rows and returns what was found."""
        rows, prompts = self._rows.view(), self._prompts.view()
        first = find_first(rows)
        repeats = np.flatnonzero(_repeats(first))
        distinct = np.ones(len(rows), dtype=np.bool_)
        distinct[repeats] = False
        asked = prompts[distinct & (prompts != 0)]
        compared = [i for i in self._texts if distinct[i]]
        near = sorted(_find_near([self._texts[i] for i in compared]), key=lambda pair: (-pair[2], pair[0], pair[1]))
        return Duplicates(
            rows=len(rows),
            exact=len(repeats),
            exact_pairs=tuple(
                Pair(self._origin(int(first[i])), self._origin(i), 1.0) for i in repeats[: self._num_shown].tolist()
            ),
            same_prompt=int(np.count_nonzero(_repeats(find_first(asked)))),
            compared=len(compared),
            near=len({second for _, second, _ in near}),
            near_pairs=tuple(
                Pair(self._origin(compared[a]), self._origin(compared[b]), similarity)
                for a, b, similarity in near[: self._num_shown]
            ),
        )


def find_first(hashes: Hashes) -> npt.NDArray[np.int32]:
    """Returns the first position of each hash, int32 [R]; sorts a part at a time, which bounds memory."""
    first = np.arange(len(hashes), dtype=np.int32)
    parts = (hashes & np.uint64(_NUM_PARTS - 1)).astype(np.uint8)
    for part in range(_NUM_PARTS):
        places = np.flatnonzero(parts == part)
        _, start, group = np.unique(hashes[places], return_index=True, return_inverse=True)
        first[places] = places[start][group]
    return first


def _repeats(first: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Returns which elements have an equal one before them, given the first of each."""
    found: npt.NDArray[np.bool_] = first != np.arange(len(first), dtype=np.int32)
    return found


class RowSearch(Protocol):
    """Compares rows with others, by their texts or by their hashes."""

    def add(self, example: Example) -> None:
        """Adds a row."""

    def add_keys(self, prompts: Hashes, rows: Hashes, origin: Callable[[int], str]) -> None:
        """Adds rows by their hashes, see :class:`RowKeys`; ``origin`` returns ``file:line`` of one of them."""


class RowKeys:
    """Hashes of rows, by which searches find them without reading them again."""

    def __init__(self) -> None:
        self.origins = Origins()
        self._prompts, self._rows = GrowingArray(np.uint64), GrowingArray(np.uint64)
        self._openings = GrowingArray(np.uint64)

    def extend(self, examples: Sequence[Example]) -> None:
        """Adds rows."""
        self.origins.extend([example.origin for example in examples])
        parts = list(map(read_parts, examples))
        prompts = _keys(prompt for prompt, _ in parts)
        self._prompts.extend(np.where([bool(prompt) for prompt, _ in parts], prompts, np.uint64(0)))
        rows = _keys(f"{prompt}\0{answer}" for prompt, answer in parts)
        self._rows.extend(rows)
        pairs = zip(examples, rows.tolist(), strict=True)
        self._openings.extend(np.array([_find_opening(example, row) for example, row in pairs], np.uint64))

    def arrays(self) -> tuple[Hashes, Hashes, Hashes]:
        """Returns hashes of rows, uint64 [R].

        They are those of prompts, 0 without a prompt; of prompts with their answers; and of openings: the first
        exchange of a conversation, the context of a question, the first of two texts; of the row if it has none.
        """
        return self._prompts.view(), self._rows.view(), self._openings.view()

    def find(self, origins: Iterable[str]) -> Hashes:
        """Returns what :func:`link_keys` returns for the rows with these origins."""
        place_of = {self.origins.at(i): i for i in range(len(self._rows.view()))}
        return link_keys(*self.arrays())[[place_of[origin] for origin in origins]]


def link_keys(prompts: Hashes, rows: Hashes, openings: Hashes) -> Hashes:
    """Returns two hashes for each row, uint64 [R, 2]; rows that share one of them belong to one conversation or task.

    The first is that of the prompt, or of the whole row if it has none; the second is that of the opening.
    """
    return np.stack([np.where(prompts == 0, rows, prompts), openings], 1)


def _find_opening(example: Example, row: int) -> int:
    """Returns the hash of what rows that belong together begin with; that of the row if there is no such text."""
    if (shared := read_shared(example)) is not None:
        return _key(shared)
    if example.texts:  # answers to one prompt
        example = next(iter(example.texts.values()))
    answers = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    if len(answers) < 2:
        return row
    return _key(*read_parts(Example(example.origin, messages=example.messages[: answers[0] + 1])))


class ContaminationSearch:
    """Finds held-out rows among the training rows that are added; keeps only hashes of training rows.

    Args:
        held_out: Rows that training should not contain.
        num_shown: Pairs that the result shows.
    """

    def __init__(self, held_out: Sequence[Example], num_shown: int = _NUM_SHOWN) -> None:
        self._num_shown = num_shown
        self._held_out = [(example.origin, *read_parts(example)) for example in held_out]
        self._wanted = {_find_key(prompt, answer) for _, prompt, answer in self._held_out}
        self._sorted = np.array(sorted(self._wanted), dtype=np.uint64)
        self._prompts: dict[int, str] = {}
        self._rows: set[int] = set()

    def add(self, example: Example) -> None:
        """Adds a training row."""
        self._add(example.origin, *read_parts(example))

    def add_keys(self, prompts: Hashes, rows: Hashes, origin: Callable[[int], str]) -> None:
        """Adds training rows by their hashes, see :class:`RowKeys`.

        Args:
            prompts: uint64 [R].
            rows: uint64 [R].
            origin: Returns ``file:line`` of one of these rows.
        """
        keys = np.where(prompts == 0, rows, prompts)
        for i in np.flatnonzero(_are_known(keys, self._sorted)).tolist():
            self._prompts.setdefault(int(keys[i]), origin(i))
            self._rows.add(int(rows[i]))

    def _add(self, origin: str, prompt: str, answer: str) -> None:
        key = _find_key(prompt, answer)
        if key in self._wanted:
            self._prompts.setdefault(key, origin)
            self._rows.add(_key(prompt, answer))

    def result(self) -> Contamination:
        """Returns the held-out rows that were found."""
        found = [
            (Pair(origin, self._prompts[key], 1.0), _key(prompt, answer) in self._rows)
            for origin, prompt, answer in self._held_out
            if (key := _find_key(prompt, answer)) in self._prompts
        ]
        return Contamination(
            rows=len(self._held_out),
            same_prompt=len(found),
            same_row=sum(same for _, same in found),
            pairs=tuple(pair for pair, _ in found[: self._num_shown]),
        )


class OverlapSearch(ContaminationSearch):
    """Also finds how many n-grams of held-out answers are in training answers."""

    def __init__(self, held_out: Sequence[Example], num_shown: int = _NUM_SHOWN) -> None:
        super().__init__(held_out, num_shown)
        self._grams = [_hash_grams(answer, NGRAM_WORDS) for _, _, answer in self._held_out]
        self._distinct: Hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._grams]))
        self._seen = np.zeros(len(self._distinct), dtype=np.bool_)

    def _add(self, origin: str, prompt: str, answer: str) -> None:
        super()._add(origin, prompt, answer)
        if len(self._distinct):
            grams = _hash_grams(answer, NGRAM_WORDS)
            places = np.searchsorted(self._distinct, grams)
            places[places == len(self._distinct)] = 0
            self._seen[places[self._distinct[places] == grams]] = True

    def result(self) -> Overlap:
        """Returns the held-out rows that were found, and the share of n-grams."""
        found = super().result()
        known = self._distinct[self._seen]
        shares = [float(_are_known(own, known).mean()) for own in self._grams if len(own)]
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


def _are_known(hashes: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Returns which hashes an ascending array contains."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: npt.NDArray[np.bool_] = known[places] == hashes
    return found


def _key(*parts: str) -> int:
    return int(_keys(["\0".join(parts)])[0])


def _find_key(prompt: str, answer: str) -> int:
    """Returns the hash by which a row is found: of its prompt, or of the whole row if it has none."""
    return _key(prompt) if prompt else _key(prompt, answer)


def _keys(texts: Iterable[str]) -> Hashes:
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), "<u8")


def _hash_grams(text: str, size: int) -> Hashes:
    """Hashes of all n-grams of ``size`` words."""
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
    """Yields near duplicates (earlier, later, similarity); each later text at most once.

    MinHash signatures are divided into bands. A text is compared, by its exact similarity, with the first and the
    latest text that share a band with it. The work stays linear, even if thousands of texts come from one template.

    Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman,
    "Mining of Massive Datasets", section 3.4.
    """
    hashed = (_hash_shingles(text) for text in texts)
    shingles = {i: own for i, own in enumerate(hashed) if len(own)}
    place = list(shingles)
    for row, near in enumerate(find_candidates(sign(shingles.values(), len(shingles)))):
        own = shingles[place[row]]
        scored = [(jaccard(shingles[place[j]], own), -place[j]) for j in set(near.tolist()) - {row}]
        if scored and max(scored)[0] >= NEAR:
            similarity, j = max(scored)
            yield -j, place[row], similarity
