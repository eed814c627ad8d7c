"""What a text may be for a model: how long, and of which tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ingle.errors import ModelError
from ingle.models.forward.rotary_by_length import rope_sections
from ingle.quant import QuantEmbedding

#: Rows that some architectures keep at the front of their table of positions (OPT: 2).
_SPARE_ROWS = range(9)


def text_limit(model: PreTrainedModel) -> int | None:
    """Most tokens that the model is made for in one text; None where its config does not say.

    ``dynamic`` positions stretch: with them it is ``factor`` times ``max_position_embeddings``.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    dynamic = [section for section in rope_sections(model.config) if section.get("rope_type") == "dynamic"]
    return int(limit * max([1.0, *(float(section.get("factor") or 1.0) for section in dynamic)]))


def refuse_longer(model: PreTrainedModel, longest: int, *, where: str) -> None:
    """Refuses texts that have more tokens than the model has positions.

    Rotary positions go on for ever. Learned ones, and masks that an architecture keeps for itself, are tables that
    end.

    Args:
        model: A model, with or without bytes.
        longest: Tokens of the longest text.
        where: The option that decides how long texts are.

    Raises:
        ModelError: When there are too few.
    """
    table = _table(model)
    if table is not None and longest > table[1]:
        name, limit = table
        raise ModelError(
            f"A text has {longest:,} tokens, and {type(model).__name__} has positions for {limit:,}.",
            where=where,
            why=f"its {name} ends there",
            fix=f"--data.max_seq_len={limit}",
        )


def num_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.out_features if isinstance(embedding, QuantEmbedding) else embedding.weight.shape[0])


def refuse_tokens_beyond(model: PreTrainedModel, largest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a token that the model has no embedding for.

    Args:
        model: A model, with or without bytes.
        largest: The largest token there is in the texts.
        tokenizer: What made it.

    Raises:
        ModelError: Tokenizer and model do not belong together.
    """
    rows = num_tokens(model)
    if largest < rows:
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    raise ModelError(
        f"The text has the token {token!r}, for which the model has no embedding.",
        where="model.tokenizer",
        why=f"it is number {largest:,}; the model has {rows:,}, from 0 on, and the tokenizer {len(tokenizer):,}",
        fix="take the tokenizer that the model was published with",
    )


def _table(model: PreTrainedModel) -> tuple[str, int] | None:
    """A table of positions, learned or computed, with its size."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    sizes = {limit + spare for spare in _SPARE_ROWS}
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings in sizes:
            return name, limit
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.dim() >= 2 and sizes & set(buffer.shape):
                return f"{name}.{key}", limit
    return None
