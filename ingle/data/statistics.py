"""What became of the rows: counted while the dataset is built, so that nothing is silent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that happened to some rows.

    Attributes:
        reason: What happened.
        count: To how many rows.
        first: ``file:line`` of the first.
    """

    reason: str
    count: int
    first: str


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What one source contributes.

    Attributes:
        path: As in ``data.sources``.
        rows: Read, dropped ones included.
        documents: Kept, pieces of split rows counted each.
        tokens: In them.
        supervised_tokens: Of these, carrying loss.
    """

    path: str
    rows: int
    documents: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class DataStats:
    """Figures of a dataset.

    Attributes:
        rows: Read from the sources.
        documents: Kept; a row that was split counts once for each piece.
        tokens: In all documents.
        supervised_tokens: Of these, carrying loss.
        truncated_documents: Cut to ``max_seq_len``.
        truncated_tokens: Lost by that.
        split_documents: Rows that became several documents.
        cut_ends: Truncated documents whose last end-of-turn token was lost, so that they teach no stopping.
        open_turns: Trained turns that no end-of-turn token follows, by the template.
        dropped: Rows left out, by reason.
        remarks: Other things that happened to rows that were kept.
        control_tokens: Rows with control tokens inside messages, by token.
        sources: Share of each source.
    """

    rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    truncated_documents: int
    truncated_tokens: int
    split_documents: int
    cut_ends: int
    open_turns: int
    dropped: tuple[Remark, ...]
    remarks: tuple[Remark, ...]
    control_tokens: tuple[Remark, ...]
    sources: tuple[SourceShare, ...]

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over all tokens."""
        return self.supervised_tokens / max(self.tokens, 1)

    @property
    def num_dropped(self) -> int:
        """Rows left out."""
        return sum(remark.count for remark in self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Tally:
    """Counts rows by reason and remembers the first of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, origin: str) -> None:
        """Count one row."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._first.setdefault(reason, origin)

    def close(self) -> tuple[Remark, ...]:
        """What was counted, in order of first occurrence."""
        return tuple(Remark(reason, count, self._first[reason]) for reason, count in self._counts.items())
