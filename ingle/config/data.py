"""``data:`` the training data and how rows become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from ingle.config.section import Count, Section, Text, one_or_more

#: Suffixes of files with one word and its tag per line.
TAGGED_SUFFIXES = (".conll", ".conllu", ".bio", ".iob", ".iob2")
#: Suffixes of data files, each also with ``.gz``.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", *TAGGED_SUFFIXES)

ControlTokens = Literal["escape", "keep", "refuse"]
Layout = Literal[
    "auto",
    "messages",
    "prompt-completion",
    "instruction",
    "sharegpt",
    "text",
    "labelled",
    "tagged",
    "conll",
    "squad",
    "source-target",
    "preference",
    "transcript",
    "judged",
    "ranked",
    "prompts",
]


class Source(Section):
    """One file, folder glob or hub dataset.

    Attributes:
        path: A file (.jsonl, .json, .csv, .tsv, .parquet or .txt, optionally .gz), a glob pattern, or a hub dataset id.
            Relative paths start from the current folder, or else from the folder of the config file.
        layout: The layout of a row. ``auto`` detects it from the column names and the objective. ``conll`` reads a file
            of any suffix with one word and its tag per line. ``transcript`` reads preferences between texts with the
            turns ``Human:`` and ``Assistant:``. ``prompts`` reads only the prompts of rows, for objectives that sample
            the answers.
        columns: Columns to rename before the layout applies, new name first: ``{prompt: mr, completion: ref}``. Dots
            lead into nested columns and lists: ``{source: translation.en, target: messages.1.content}``.
        label: The label of every row (``classify``, ``kto``, ``bco``), for files with the texts of one class.
        lines: Read a text file of any suffix as one text per line, rather than as one text.
        split: Split of a hub dataset.
        name: Configuration name of a hub dataset.
        limit: Read only this many rows, from the start.
    """

    path: Text
    layout: Layout = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    split: Text = "train"
    name: Text | None = None
    limit: Count | None = None
    label: Text | None = None
    lines: bool = False


Sources = Annotated[
    tuple[Source, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(one_or_more("path"), json_schema_input_type=list[Source | Text] | Source | Text),
]

#: As :data:`Sources`, but may be empty.
OptionalSources = Annotated[
    tuple[Source, ...],
    Strict(False),
    BeforeValidator(one_or_more("path"), json_schema_input_type=list[Source | Text] | Source | Text),
]


class ValidationData(Section):
    """Rows on which the loss is measured during training, but which are not trained on.

    A number is short for ``{share: ...}``, files are short for ``{sources: ...}``.

    Attributes:
        share: Hold out about this share of the training rows. Rows with the same prompt and near duplicates stay on one
            side, so nothing that is trained on is validated on. The split depends on the content of the rows and on
            ``seed``, not on their order: rows that are added later change nothing for the others.
        sources: Rows of their own, read like ``data.sources``.
    """

    share: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    sources: OptionalSources = ()

    @classmethod
    def short_for(cls, value: Any) -> str | None:
        """Returns ``sources`` for files, and ``share`` for a number."""
        return "sources" if isinstance(value, str | list | tuple) else "share"


def _read_validation(value: Any) -> Any:
    """Returns the section that a share or sources are short for."""
    if value is None or isinstance(value, Mapping | Section):
        return value
    return {ValidationData.short_for(value): value}


class DataConfig(Section):
    """The training data.

    Attributes:
        sources: Files or hub datasets. A string is short for ``{path: ...}``.
        max_seq_len: Longest document in tokens (of ``span``, the longest source); also the length of a packed sequence.
        max_target_len: Longest target of an encoder-decoder in tokens; as ``max_seq_len`` if null.
        packing: Lay several documents end to end in one sequence. Attention never crosses document boundaries.
        train_on: Tokens that contribute to the loss: those of every ``assistant`` turn, of the ``last`` assistant turn,
            or ``all`` tokens, the user's included.
        too_long: How to handle a document longer than ``max_seq_len``: ``truncate`` its end, ``drop`` it, or ``split``
            it into several (plain text only). Affected documents are counted. ``auto`` splits for ``clm``, ``mlm`` and
            ``span``, cuts prompts but no answers of preferences and judged rows (``truncate`` cuts both), drops prompts
            that leave no room for the sampled answer (``truncate`` cuts their oldest messages), and truncates
            otherwise. Long texts of ``tag`` and ``answer`` become overlapping windows.
        shuffle: Shuffle the sequences before each epoch.
        system: System message for conversations that have none.
        control_tokens: How to read control tokens (``<|im_end|>``, ``</s>``) inside messages, prompts and completions:
            ``escape`` reads them as plain text, ``keep`` as control tokens, ``refuse`` raises an error. Plain-text
            documents are always read as they are.
        validation: Held-out rows on which the loss is measured during training, every ``evaluate.every`` steps: a share
            of the training rows such as ``0.02``, or files. If null, nothing is measured.
    """

    sources: Sources
    max_seq_len: Annotated[int, Field(ge=8, le=16_777_216)] = 1024
    max_target_len: Annotated[int, Field(ge=2, le=16_777_216)] | None = None
    packing: bool = True
    train_on: Literal["assistant", "last", "all"] = "assistant"
    too_long: Literal["auto", "truncate", "drop", "split"] = "auto"
    shuffle: bool = True
    system: str | None = None
    control_tokens: ControlTokens = "escape"
    validation: (
        Annotated[
            ValidationData,
            BeforeValidator(
                _read_validation, json_schema_input_type=ValidationData | float | list[Source | Text] | Text
            ),
        ]
        | None
    ) = None
