"""What virtual tokens cost: prompt tuning computes more tokens, and prefix tuning more keys in every layer.

Legend: P virtual tokens, H hidden size, E width of an encoder, T width of a layer's keys.
"""

from __future__ import annotations

from dataclasses import replace

from ingle.config.adapter_kinds import PrefixAdapter, PromptAdapter
from ingle.config.run import Run
from ingle.planning.shape import DataShape, LayerShape, ModelShape


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


def virtual_parameters(adapter: PrefixAdapter | PromptAdapter, model: ModelShape) -> int:
    """Counts the trained parameters of virtual tokens and of the network that computes them."""
    if isinstance(adapter, PromptAdapter):
        return _prompt_parameters(adapter, model.hidden_size)
    widths = [(_key_width(layer), layer.count) for layer in model.layers]
    number, width = adapter.num_virtual_tokens, widths[0][0]
    if adapter.encoder == "none":
        return sum(2 * number * each * count for each, count in widths)
    inner = adapter.encoder_hidden_size or width
    return number * width + inner * (width + 1) + sum(2 * each * (inner + 1) * count for each, count in widths)


def _key_width(layer: LayerShape) -> int:
    return layer.num_kv_heads * layer.head_dim


def _prompt_parameters(adapter: PromptAdapter, hidden: int) -> int:
    embeddings, inner = adapter.num_virtual_tokens * hidden, adapter.encoder_hidden_size or hidden
    if adapter.encoder == "none":
        return embeddings
    if adapter.encoder == "mlp":
        return embeddings + inner * (hidden + 1) + inner * (inner + 1) + hidden * (inner + 1)
    # Two bidirectional layers of an LSTM, each with four gates and two biases; then two linear layers.
    recurrent = 2 * 4 * inner * ((hidden + inner + 2) + (2 * inner + inner + 2))
    return embeddings + recurrent + 2 * inner * (2 * inner + 1) + hidden * (2 * inner + 1)
