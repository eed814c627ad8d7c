"""Writes models in the layout of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ingle.atomic import atomic_folder
from ingle.models.generation.stop_criteria import end_token_ids
from ingle.quant.linear import QuantModule

#: Small enough for file systems and uploads, large enough that most models need few shards.
_SHARD_SIZE = "4GB"


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights, config, generation config, tokenizer and chat template, atomically.

    The names in the files are the hub's (transformers' conversions are reverted); tied weights are written once.

    Args:
        model: A model without quantized weights and adapters.
        tokenizer: Its tokenizer.
        folder: Replaced if it exists.

    Raises:
        CheckpointError: The disk is full.
    """
    assert not any(isinstance(module, QuantModule) for module in model.modules()), "quantized weights cannot be saved"
    with atomic_folder(folder) as partial, quiet():
        model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(partial)


def save_setup(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    untied: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything except the weights: config, generation config, tokenizer and chat template.

    Args:
        model: May be on the meta device.
        tokenizer: Its tokenizer.
        folder: An existing folder.
        dtype: Dtype of the weights in the files.
        untied: Whether the output head has its own weight in the files.
        quantization: The ``quantization_config`` of quantized weights.
    """
    config = deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if quantization is not None:
        path = folder / "config.json"
        written = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": dict(quantization)}
        path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        settings = deepcopy(model.generation_config)
        ends = sorted(end_token_ids(model, cast(PreTrainedTokenizerFast, tokenizer)))
        settings.eos_token_id = ends if len(ends) != 1 else ends[0]
        settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars; Ingle reports progress as events."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
