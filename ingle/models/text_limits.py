"""Checks texts against a model: how long they may be, which tokens they may have, and how they may end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ingle.errors import ModelError
from ingle.models.forward.rotary_by_length import rope_sections
from ingle.models.forward.virtual_tokens import virtual_length
from ingle.models.text_part import text_config
from ingle.quant import QuantEmbedding

#: Extra rows that some architectures keep at the start of their position table (OPT: 2).
_SPARE_ROWS = range(9)
_SHORT = "original_max_position_embeddings"


def text_limit(model: PreTrainedModel) -> int | None:
    """Returns the maximum number of tokens of a text; None if the config does not name one.

    ``dynamic`` positions stretch to ``factor`` times ``max_position_embeddings``. The virtual tokens of an adapter take
    the first positions.
    """
    config = text_config(model.config)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    dynamic = [section for section in rope_sections(config) if section.get("rope_type") == "dynamic"]
    stretched = int(limit * max([1.0, *(float(section.get("factor") or 1.0) for section in dynamic)]))
    return max(1, stretched - virtual_length(model))


def unscaled_limit(model: PreTrainedModel) -> int | None:
    """Returns the number of tokens up to which ``longrope`` uses its factors for short texts; None without it."""
    sections = rope_sections(text_config(model.config))
    found = [section[_SHORT] for section in sections if section.get("rope_type") == "longrope" and _SHORT in section]
    return min(map(int, found), default=None)


def refuse_longer(model: PreTrainedModel, longest: int, *, where: str, virtual: int = 0) -> None:
    """Refuses texts that have more tokens than the model has positions.

    Rotary positions have no limit. Learned positions, and masks that an architecture stores, are tables of fixed size.

    Args:
        model: May be on the meta device.
        longest: Tokens of the longest text.
        where: The option that determines the length of texts.
        virtual: Number of virtual tokens that an adapter will put before every text.

    Raises:
        ModelError: There are too few positions.
    """
    table = _find_position_table(model)
    if table is not None and longest + virtual > table[1]:
        name, limit = table
        added = f" and {virtual:,} virtual ones before them" if virtual else ""
        raise ModelError(
            f"A text has {longest:,} tokens{added}, but {type(model).__name__} has only {limit:,} positions.",
            where=where,
            why=f"its table {name} has no more entries",
            fix=f"--data.max_seq_len={limit - virtual}" if limit > virtual else "--adapter.num_virtual_tokens=8",
        )


def num_tokens(model: PreTrainedModel) -> int:
    """Returns how many tokens the model has embeddings for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.out_features if isinstance(embedding, QuantEmbedding) else embedding.weight.shape[0])


def refuse_tokens_beyond(model: PreTrainedModel, largest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a token that the model has no embedding for.

    Args:
        model: May be on the meta device.
        largest: The largest token id in the texts.
        tokenizer: The tokenizer of the texts.

    Raises:
        ModelError: The tokenizer does not belong to the model.
    """
    rows = num_tokens(model)
    if largest < rows:
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    raise ModelError(
        f"The text has the token {token!r}, for which the model has no embedding.",
        where="model.tokenizer",
        why=f"its id is {largest:,}; the model has {rows:,} embeddings and the tokenizer {len(tokenizer):,} tokens",
        fix="use the tokenizer that the model was published with",
    )


def _find_position_table(model: PreTrainedModel) -> tuple[str, int] | None:
    """Returns name and size of a table of positions, learned or computed."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
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


def choose_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, endings: Collection[int], *, is_needed: bool = True
) -> str | None:
    """Gives a decoder that classifies texts a padding token that no text ends with, in its config and in the tokenizer.

    transformers reads such a model at the last token that is not the padding token, even where nothing is padded.

    Args:
        model: May be on the meta device.
        tokenizer: Its tokenizer.
        endings: Last tokens of all texts.
        is_needed: Whether the model needs such a token here, too. Otherwise it gets none if there is none: then
            transformers reads single texts at their last token, and refuses several.

    Returns:
        A sentence if the model has no such token.

    Raises:
        ModelError: Texts end with all special tokens.
    """
    config = text_config(model.config)
    known = tokenizer.added_tokens_decoder
    special = sorted(number for number, token in known.items() if token.special)
    preferred = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.unk_token_id)
    candidates = [each for each in (*preferred, *reversed(special)) if isinstance(each, int)]
    fitting = (each for each in candidates if 0 <= each < num_tokens(model) and each not in endings)
    padding = next(fitting, None)
    if padding is None and not is_needed:
        config.pad_token_id = None
        return (
            "Other programs can score one answer at a time only: the tokenizer has no token for padding that no answer "
            "ends with."
        )
    if padding is None:
        raise ModelError(
            "The tokenizer has no token for padding that no text ends with.",
            where="model.id",
            why=f"{type(model).__name__} reads a text at its last token that is no padding",
            fix="add a special token for padding to the tokenizer",
        )
    config.pad_token_id = padding
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return None
