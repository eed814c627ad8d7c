"""Results of reading and inspecting a dataset.

``dataclasses.asdict`` of a :class:`DataReport` or :class:`RowsReport` is the JSON of ``ingle data inspect --json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ingle.config.objective import ObjectiveKind


@dataclass(frozen=True, slots=True)
class Remark:
    """A remark on ``count`` rows; ``first`` is the ``file:line`` of the first of them."""

    reason: str
    count: int
    first: str


@dataclass(frozen=True, slots=True)
class SourceShare:
    """Figures of one source; ``rows`` includes dropped ones, the others do not."""

    path: str
    rows: int
    documents: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class DataStats:
    """Figures of a dataset, counted while it is built.

    Attributes:
        rows: Rows read from the sources.
        documents: Documents kept; every piece of a split row counts.
        supervised_tokens: Tokens that carry loss.
        truncated_documents: Documents cut to ``max_seq_len``.
        truncated_tokens: Tokens lost by cutting.
        split_documents: Rows that became several documents.
        cut_ends: Truncated documents that lost their last end-of-turn token and so do not teach the model to stop.
        open_turns: Trained turns that the template does not end with an end-of-turn token.
        dropped: Rows left out, by reason.
        remarks: Remarks on rows that were kept.
        control_tokens: Rows with control tokens inside messages, by token.
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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows, by ``file:line``, and their similarity from 0 to 1."""

    first: str
    second: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Rows that repeat earlier ones.

    Attributes:
        exact: Rows equal to an earlier one; ``exact_pairs`` has the first of them.
        same_prompt: Rows with the prompt of an earlier row and another answer.
        compared: Distinct rows that were compared for near duplicates.
        near: Compared rows that are similar to an earlier one; ``near_pairs`` has the most similar.
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
    """Held-out rows that are also in the training data.

    Attributes:
        rows: Held-out rows.
        same_prompt: Rows whose prompt is in the training data.
        same_row: Rows whose prompt and answer are both in the training data.
        pairs: The first of these rows, each with its training row.
    """

    rows: int
    same_prompt: int
    same_row: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Overlap(Contamination):
    """Contamination, and the words of held-out answers that are in training answers.

    Attributes:
        ngram_words: Number of words in an n-gram.
        answers: Held-out answers with at least one n-gram.
        ngram_share: Mean share of their n-grams that are in training answers.
        half_seen: Answers with at least half of their n-grams in training answers.
    """

    ngram_words: int
    answers: int
    ngram_share: float
    half_seen: int


@dataclass(frozen=True, slots=True)
class Bar:
    """Number of documents or rows with ``low <= length <= high``."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of documents in tokens (after truncation), or of rows in characters."""

    min: int
    median: float
    mean: float
    p95: float
    max: int
    histogram: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of one kind, decoded."""

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """One document as the model sees it.

    Attributes:
        label: Its label; empty if it has none.
        target: What the decoder predicts.
        token_types: Types of consecutive tokens, and their number; empty if the model has no token types.
        columns: What rewards get in addition to a prompt, by name, as JSON.
    """

    origin: str
    num_tokens: int
    num_supervised: int
    stretches: tuple[Stretch, ...]
    label: str = ""
    target: tuple[Stretch, ...] = ()
    token_types: tuple[tuple[int, int], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LabelShare:
    """Number of rows with a class, and the mean tokens of their documents; or number of words with a tag."""

    name: str
    count: int
    mean_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """Number of documents whose last supervised token is ``token``."""

    token: str
    count: int
    ends_turn: bool


@dataclass(frozen=True, slots=True)
class Packing:
    """Sequences of an epoch; ``efficiency`` is the number of their tokens over the number that would fit."""

    enabled: bool
    sequences: int
    max_seq_len: int
    efficiency: float


@dataclass(frozen=True, slots=True)
class RewardColumn:
    """A column that rewards get in addition to prompts and answers; ``count`` prompts have a value in it."""

    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of ``count`` cases, and its 95 % interval."""

    share: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class PreferenceReport:
    """Preferences between answers, or answers that were judged good or bad.

    Attributes:
        prompts: Distinct prompts.
        pairs: Pairs of a row with different scores; 0 for judged answers.
        near_prompts: Prompts that are similar to an earlier one.
        ties: Pairs of a row with equal scores, which teach nothing.
        good: Good answers, if they are judged.
        bad: Bad answers, if they are judged.
        better_tokens: Mean tokens of the better answers of pairs, or of good answers.
        worse_tokens: Mean tokens of the worse answers of pairs, or of bad answers.
        better_truncated: Better or good answers without their end.
        worse_truncated: Worse or bad answers without their end.
        half_truncated: Pairs of an answer with its end and one without.
        longer_wins: How often the longer answer of a pair is the better one.
        repeated: Pairs, or answers, that were judged more than once.
        exact: Judgements that repeat an earlier one.
        contradictory: Pairs, or answers, that were judged both ways; ``contradictions`` has the first of them.
        noise: Estimated rate of wrong judgements; None if too few were repeated.
        beta: Proposed ``objective.beta``; None for judged answers.
    """

    rows: int
    prompts: int
    answers: int
    pairs: int
    near_prompts: int
    ties: int
    good: int
    bad: int
    better_tokens: float
    worse_tokens: float
    better_truncated: int
    worse_truncated: int
    half_truncated: int
    longer_wins: Rate | None
    repeated: int
    exact: int
    contradictory: int
    contradictions: tuple[Pair, ...]
    noise: Rate | None
    beta: float | None


@dataclass(frozen=True, slots=True)
class DataReport:
    """Result of ``ingle data inspect`` with a model.

    Attributes:
        lengths: Of documents; of sources, where rows have a source and a target.
        endings: Last supervised tokens of documents, most frequent first.
        overlap: Between training data and held-out rows; None without held-out rows.
        previews: A few documents.
        problems: Problems to look at, in sentences.
        labels: The classes or tags, in the order of the head's outputs.
        answered: Documents that contain the answer to their question; None for other objectives.
        targets: Lengths of targets; None for other objectives.
        preferences: Of objectives that learn from preferences or judgements; None for others.
        columns: What rewards get in addition to prompts and answers, where answers are sampled.
    """

    objective: ObjectiveKind
    stats: DataStats
    lengths: Lengths
    packing: Packing
    endings: tuple[Ending, ...]
    duplicates: Duplicates
    overlap: Overlap | None
    previews: tuple[Preview, ...]
    problems: tuple[str, ...]
    labels: tuple[LabelShare, ...] = ()
    answered: int | None = None
    targets: Lengths | None = None
    preferences: PreferenceReport | None = None
    columns: tuple[RewardColumn, ...] = ()


@dataclass(frozen=True, slots=True)
class RowPreview:
    """One row: its ``file:line``, and its texts, each with a role (``text`` for plain text)."""

    origin: str
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RowsReport:
    """Result of ``ingle data inspect FILE`` without a model.

    Attributes:
        path: As typed.
        layouts: Number of rows by layout.
        columns: Columns of the first row.
        characters: Lengths of rows in characters.
        previews: A few rows.
        problems: Problems to look at, in sentences.
        labels: Number of rows by class, or of words by tag.
    """

    path: str
    rows: int
    layouts: dict[str, int]
    columns: tuple[str, ...]
    characters: Lengths
    duplicates: Duplicates
    previews: tuple[RowPreview, ...]
    problems: tuple[str, ...]
    labels: dict[str, int] = field(default_factory=dict)
