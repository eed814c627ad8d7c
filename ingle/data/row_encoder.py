"""What turns a row into documents: one encoder for every kind of row, and the counts of what they skip or cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.config.data import ControlTokens as Policy
from ingle.config.data import DataConfig
from ingle.config.objective import (
    Answer,
    Classify,
    ObjectiveConfig,
    ObjectiveKind,
    Seq2Seq,
    Span,
    Tag,
    reads_answers,
    samples_answers,
)
from ingle.config.policy import Sampled
from ingle.config.preferences import Bco, Kto
from ingle.data.corruption import denoisers, longest_text
from ingle.data.template import TrainOn
from ingle.data.types import Example, Ids, Mask
from ingle.errors import ConfigError
from ingle.report.data_results import Remark

#: How labels of texts are read: one class, any number of classes, or a number.
Problem = Literal["single", "multi", "regression"]

#: What reads the tokens; only the documents of answers depend on it.
ModelKind = Literal["causal", "encoder", "encoder_decoder"]

_NONE: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """What decides, next to the tokenizer, how rows become tokens.

    Attributes:
        objective: As ``objective.kind``.
        train_on: As ``data.train_on``; ``all`` for ``clm``.
        too_long: As ``data.too_long``, but never ``auto``; ``cut_prompts`` cuts prompts and drops answers.
        max_seq_len: As ``data.max_seq_len``, in tokens.
        system: As ``data.system``.
        control_tokens: As ``data.control_tokens``.
        max_target_len: Longest target of ``seq2seq`` in tokens.
        labels: The names of classes or tags, in the order of the head's outputs.
        problem: How the labels of ``classify`` are read.
        stride: Tokens that two windows of a long text share (``tag``, ``answer``).
        prefix: Text before every source (``seq2seq``).
        max_text_len: Longest text of ``span`` in tokens, whose source has at most ``max_seq_len``; 0 without spans.
        model_kind: What reads the answers of a row, or its prompt alone; ``causal`` for all other rows.
        max_answer_len: Tokens that a prompt leaves free for the answer that is sampled; 0 for all other rows.
        threshold: Scores above it are good answers (``kto``, ``bco``); None if all scores are 1 or 0.
        with_labels: Whether every row must have a label; rows to predict have none.
    """

    objective: ObjectiveKind
    train_on: TrainOn
    too_long: Literal["truncate", "drop", "split", "cut_prompts"]
    max_seq_len: int
    system: str | None
    control_tokens: Policy
    max_target_len: int
    labels: tuple[str, ...] = ()
    problem: Problem = "single"
    stride: int = 0
    prefix: str = ""
    max_text_len: int = 0
    with_labels: bool = True
    model_kind: ModelKind = "causal"
    threshold: float | None = None
    max_answer_len: int = 0

    def refuse_split(self, what: str) -> None:
        """Makes sure that rows which must stay whole are not split.

        Args:
            what: What a row has, as the subject of a sentence.

        Raises:
            ConfigError: ``too_long: split``.
        """
        if self.too_long == "split":
            raise ConfigError(
                f"{what} cannot be split into several documents.",
                where="data.too_long = split",
                fix="--data.too_long=truncate or --data.too_long=drop",
            )


def token_options(
    data: DataConfig, objective: ObjectiveConfig | ObjectiveKind, model_kind: ModelKind = "causal"
) -> TokenOptions:
    """Returns the options of a config.

    Args:
        data: Sources and options.
        objective: With the names of its labels, see :func:`~ingle.data.label_names.name_labels`; or a kind without
            options.
        model_kind: What reads the tokens.
    """
    kind = objective if isinstance(objective, str) else objective.kind
    default: Literal["split", "truncate", "cut_prompts", "drop"] = "truncate"
    if kind in ("clm", "mlm", "span"):
        default = "split"
    elif reads_answers(kind):
        default = "cut_prompts"
    elif samples_answers(kind):
        default = "drop"
    options = TokenOptions(
        objective=kind,
        train_on=data.train_on if kind == "sft" else "all",
        too_long=default if data.too_long == "auto" else data.too_long,
        max_seq_len=data.max_seq_len,
        system=data.system,
        control_tokens=data.control_tokens,
        max_target_len=data.max_target_len or data.max_seq_len,
        model_kind=model_kind if reads_answers(kind) or samples_answers(kind) else "causal",
    )
    return _with_objective(options, objective)


def row_options(objective: ObjectiveConfig, max_seq_len: int) -> TokenOptions:
    """Returns the options for rows to predict, which have no labels.

    Args:
        objective: With the names of its labels.
        max_seq_len: Longest document in tokens; longer texts are cut, or become several documents.
    """
    options = TokenOptions(
        objective=objective.kind,
        train_on="all",
        too_long="split" if objective.kind in ("clm", "mlm", "span") else "truncate",
        max_seq_len=max_seq_len,
        system=None,
        control_tokens="escape",
        max_target_len=max_seq_len,
        with_labels=False,
    )
    return _with_objective(options, objective)


def _with_objective(options: TokenOptions, objective: ObjectiveConfig | ObjectiveKind) -> TokenOptions:
    match objective:
        case Classify(labels=labels, problem=problem):
            assert problem != "auto", "the labels have no names yet"
            return replace(options, labels=labels or (), problem=problem)
        case Tag(labels=labels, stride=stride):
            assert labels is not None, "the labels have no names yet"
            return replace(options, labels=labels, stride=stride)
        case Answer(stride=stride):
            return replace(options, stride=stride)
        case Kto(threshold=threshold) | Bco(threshold=threshold):
            return replace(options, threshold=threshold)
        case Sampled(rollout=rollout):
            return replace(options, max_answer_len=rollout.max_new_tokens)
        case Seq2Seq(prefix=prefix):
            return replace(options, prefix=prefix)
        case Span(style="t5" | "ul2"):
            longest = longest_text(options.max_seq_len, denoisers(objective), objective.mode_tokens)
            return replace(options, max_text_len=longest)
    return options


class Tally(dict[str, tuple[int, str]]):
    """Number of rows by reason, and ``file:line`` of the first of each."""

    def add(self, reason: str, origin: str, count: int = 1) -> None:
        """Adds rows; ``origin`` is the first of them."""
        former, first = self.get(reason, (0, origin))
        self[reason] = (former + count, first)

    def close(self) -> tuple[Remark, ...]:
        """Returns the counts in the order in which reasons were added."""
        return tuple(Remark(reason, *found) for reason, found in self.items())


@dataclass(slots=True)
class Counts:
    """Figures of rows that were tokenized; see :class:`~ingle.report.data_results.DataStats`."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    split_documents: int = 0
    cut_ends: int = 0
    open_turns: int = 0
    dropped: Tally = field(default_factory=Tally)
    remarks: Tally = field(default_factory=Tally)
    control_tokens: Tally = field(default_factory=Tally)

    def add(self, other: Counts) -> None:
        """Adds the figures of rows that follow."""
        for name in (entry.name for entry in fields(self)):
            own, more = getattr(self, name), getattr(other, name)
            if not isinstance(own, Tally):
                setattr(self, name, own + more)
                continue
            for reason, (count, first) in more.items():
                own.add(reason, first, count)


class Piece(NamedTuple):
    """A document of a row.

    Attributes:
        ids: int32 [T].
        supervised: bool [T], tokens that carry loss, or that an objective may choose to predict.
        name: Its name among the texts of its row; empty if the documents of the row are independent.
        token_columns: Labels and types of tokens by name, [T]; see :data:`ingle.data.batch.COLUMNS`.
        document_columns: Labels of the document by name, [] or [C].
        spans: int32 [T, 2], the characters of each token in the text whose places a prediction names, without white
            space before them; -1 for other tokens. None where no prediction names places. It is not stored.
    """

    ids: Ids
    supervised: Mask
    name: str = ""
    token_columns: Mapping[str, npt.NDArray[Any]] = _NONE
    document_columns: Mapping[str, npt.ArrayLike] = _NONE
    spans: npt.NDArray[np.int32] | None = None


class RowEncoder(Protocol):
    """Turns rows of one kind into documents."""

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the documents of each row that is kept, in order.

        Args:
            examples: Rows.
            counts: Receives everything but rows, documents and tokens: what is dropped, cut or unusual.

        Raises:
            DataError: A row cannot be tokenized, or its label is unknown or missing.
            ConfigError: An option does not suit the rows.
        """
