"""Writes a small random model of the same architecture as another one, with the same tokenizer, for rehearsals."""

from __future__ import annotations

from pathlib import Path

import torch

from ingle.config.model import ModelConfig
from ingle.models.boundary import COMPARE_CONFIG, reading
from ingle.models.interop.saving import save_pretrained
from ingle.models.kinds import ModelTask, new_model
from ingle.models.loading.config_json import config_path, read_config
from ingle.models.loading.meta_device import seeded
from ingle.models.loading.small_config import Size, shrink
from ingle.models.tokenizer import load_tokenizer

#: Wide enough for one block of every format, and for two rows of blocks on each of several ranks.
SIZE = Size(width=256, layers=2)


def write_tiny_model(model: ModelConfig, folder: Path) -> int:
    """Writes a random model of a few small layers, and its tokenizer, in the layout of the hub.

    It has the same type and options as ``model``, one layer of each kind (attention windows, experts), and the same
    vocabulary, so that the same tokenizer works.

    Args:
        model: The model to imitate; its weights are not read.
        folder: Replaced if it exists.

    Returns:
        The number of its parameters.

    Raises:
        ModelError: The model or its tokenizer cannot be read.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    config = shrink(read_config(model), SIZE)
    tokenizer = load_tokenizer(model)
    with (
        reading(
            config_path(model), "transformers cannot build a small model of this architecture.", fix=COMPARE_CONFIG
        ),
        seeded(0),
    ):
        built = new_model(config, ModelTask(), dtype=torch.bfloat16, trust_remote_code=model.trust_remote_code)
    save_pretrained(built, tokenizer, folder)
    return sum(parameter.numel() for parameter in built.parameters())
