"""What virtual tokens cost: prompt tuning computes more tokens, and prefix tuning more keys in every layer.

Their parameters are counted with those of all adapters, in :mod:`ingle.planning.adapter_cost`.
"""

from __future__ import annotations

from dataclasses import replace

from ingle.config.adapter_kinds import PrefixAdapter, PromptAdapter
from ingle.config.run import Run
from ingle.planning.shape import DataShape


def with_virtual_tokens(run: Run, data: DataShape) -> DataShape:
    """Returns the shape of data as a model computes it, with the embeddings of a prompt before every document."""
    if not isinstance(run.adapter, PromptAdapter):
        return data
    added = run.adapter.num_virtual_tokens
    document = max(1.0, data.mean_document or data.longest_document or data.longest)

    def grown(tokens: int) -> int:
        return round(tokens * (1 + added / document))

    return replace(
        data,
        num_tokens=grown(data.num_tokens),
        longest=max(data.longest + added, grown(data.longest)),
        longest_document=data.longest_document + added if data.longest_document else 0,
        mean_document=data.mean_document + added if data.mean_document else 0.0,
        validation_tokens=grown(data.validation_tokens),
    )


def num_added_keys(run: Run) -> int:
    """Returns the number of keys that every token sees besides those of its document."""
    return run.adapter.num_virtual_tokens if isinstance(run.adapter, PrefixAdapter) else 0
