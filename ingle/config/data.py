"""``data:`` what to learn from and how rows become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict

from ingle.config.section import Count, Section, Text, one_or_more

#: Suffixes of data files, each also with ``.gz``.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")

ControlTokens = Literal["escape", "keep", "refuse"]
Layout = Literal["auto", "messages", "prompt-completion", "instruction", "sharegpt", "text"]


class Source(Section):
    """One file, folder glob or hub dataset.

    Attributes:
        path: ``train.jsonl`` (also .json, .csv, .parquet, .txt, each also .gz), a glob, or a hub dataset id.
            Relative to the current folder; if nothing is there, to the folder of the config file.
        layout: How a row is to be read; ``auto`` looks at its keys.
        columns: Renames columns before the layout is read: ``{prompt: mr, completion: ref}``.
        split: Split of a hub dataset.
        name: Configuration name of a hub dataset.
        limit: Read only the first rows.
    """

    path: Text
    layout: Layout = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    split: Text = "train"
    name: Text | None = None
    limit: Count | None = None


Sources = Annotated[
    tuple[Source, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(one_or_more("path"), json_schema_input_type=list[Source | Text] | Source | Text),
]


class DataConfig(Section):
    """What to learn from.

    Attributes:
        sources: Files or hub datasets; a bare string is its path.
        max_seq_len: Longest document in tokens; also the size of a packed sequence.
        packing: Put several documents into one sequence; attention never crosses them.
        train_on: Which assistant turns carry loss (``all`` also trains on the user's words).
        too_long: What happens to a document longer than ``max_seq_len``: ``truncate`` its end, ``drop`` it
            (counted and shown), ``split`` it into several (plain text only; the default for ``clm``), or
            ``auto``: split for ``clm``, truncate for ``sft``.
        shuffle: Shuffle the sequences anew each epoch.
        system: A system message put before conversations that have none.
        control_tokens: What happens to control tokens (``<|im_end|>``, ``</s>``) inside messages, prompts and
            completions: ``escape`` reads them as text, ``keep`` as the tokens that they spell, ``refuse`` makes the
            row an error. Plain text is read as it stands.
    """

    sources: Sources
    max_seq_len: Annotated[int, Field(ge=8, le=16_777_216)] = 1024
    packing: bool = True
    train_on: Literal["assistant", "last", "all"] = "assistant"
    too_long: Literal["auto", "truncate", "drop", "split"] = "auto"
    shuffle: bool = True
    system: str | None = None
    control_tokens: ControlTokens = "escape"
