"""Prompts whose answers are sampled: their tokens, and the columns of their rows that rewards get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from ingle.config.data import DataConfig
from ingle.config.objective import ObjectiveConfig, ObjectiveKind
from ingle.data.compiled_template import as_mapping
from ingle.data.dataset import TokenDataset
from ingle.data.dataset_builder import build_dataset
from ingle.data.duplicates import RowSearch
from ingle.data.row_encoder import ModelKind
from ingle.data.template import read_conversation
from ingle.data.types import Example, Ids, Tokenizer
from ingle.events import Sink


class PromptSet(TokenDataset):
    """Prompts: every document is one, as generation reads it, and no token carries loss.

    Texts and columns stay in memory.

    Args:
        tokens: The prompts as documents.
        rows: The row of each prompt.
        system: As ``data.system``.

    Attributes:
        column_names: Columns that any row has, in the order of their first row.
    """

    def __init__(self, tokens: TokenDataset, rows: Sequence[Example], system: str | None = None) -> None:
        super().__init__(tokens.tokens, tokens.stats)
        assert len(rows) == len(self), "a prompt lacks its row"
        self._rows, self._system = rows, system
        self.column_names = tuple(dict.fromkeys(name for row in rows for name in row.columns))

    def ids(self, i: int) -> Ids:
        """Returns the tokens of prompt ``i``, int32 [T], which the sampler continues."""
        return self.sample(i).input_ids

    def prompt(self, i: int) -> str | list[dict[str, Any]]:
        """Returns prompt ``i`` as rewards get it: a text, or messages with ``role`` and ``content``."""
        row = self._rows[i]
        if not row.messages:
            return row.prompt or ""
        return [as_mapping(message) for message in read_conversation(row, self._system)]

    def columns(self, i: int) -> dict[str, Any]:
        """Returns the columns of prompt ``i`` as JSON values; None where its row has no value."""
        return {name: self._rows[i].columns.get(name) for name in self.column_names}

    def fingerprint(self) -> str:
        """Returns a SHA-256 of tokens, prompts and columns; equal data has equal fingerprints."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for i in range(len(self)):
            digest.update(json.dumps([self.prompt(i), self.columns(i)], sort_keys=True).encode())
        return digest.hexdigest()


def build_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    objective: ObjectiveConfig | ObjectiveKind,
    model_kind: ModelKind = "causal",
    sink: Sink | None = None,
    search: RowSearch | None = None,
    on_example: Callable[[Example], None] | None = None,
) -> PromptSet:
    """Reads and tokenizes the prompts of all sources.

    Args:
        data: Sources and options.
        tokenizer: The model's tokenizer.
        objective: One whose answers are sampled; its answers take room from the prompts.
        model_kind: What reads the prompts.
        sink: Receives ``Progress``, and ``Warned`` for everything that was skipped, cut or unusual.
        search: Receives every row; large sources are not read again for it.
        on_example: Called with every row, in order.

    Raises:
        DataError: A row is malformed or has no prompt, or no prompt is left.
        ConfigError: ``too_long: split``, or the answers leave no room for prompts.
        HubUnavailable: A hub dataset cannot be reached.
    """
    rows: list[Example] = []

    def keep(example: Example) -> None:
        rows.append(example)
        if on_example is not None:
            on_example(example)

    found = build_dataset(
        data,
        tokenizer,
        objective=objective,
        model_kind=model_kind,
        sink=sink,
        on_example=keep,
        search=search,
    )
    return PromptSet(found, _find_kept(found, rows), data.system)


def _find_kept(found: TokenDataset, rows: Sequence[Example]) -> list[Example]:
    """Returns the rows of documents; both have the same order, and rows that were dropped have none."""
    places = iter(rows)
    return [next(row for row in places if row.origin == found.origin(i)) for i in range(len(found))]
