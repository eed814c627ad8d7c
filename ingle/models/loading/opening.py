"""All steps of loading in one call, for those who do not need them one by one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ingle.config.base import BaseConfig, NoBase
from ingle.config.model import ModelConfig
from ingle.events import Sink
from ingle.models.forward.verification import verify
from ingle.models.loading.architecture import compute_dtype, meta_model
from ingle.models.loading.gguf_model import convert_base
from ingle.models.loading.weights import load_weights


def load_model(
    model: ModelConfig,
    base: BaseConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    sink: Sink | None = None,
) -> PreTrainedModel:
    """A model with its weights in a base format, in evaluation mode.

    Args:
        model: Which model.
        base: The format of its weights; the compute type when None.
        device: Where it goes.
        seed: Of the random initialisation (``init: random``).
        sink: Told of progress and warnings.

    Raises:
        ModelError: When it cannot be found, read or supported.
        QuantizationError: When a weight cannot be held in the format.
    """
    dtype = compute_dtype(model.dtype, device)
    loaded = meta_model(model, device, dtype)
    convert_base(loaded, model, base if base is not None else NoBase())
    load_weights(loaded, model, device, dtype, seed=seed, sink=sink)
    verify(loaded)
    loaded.eval()
    return loaded
