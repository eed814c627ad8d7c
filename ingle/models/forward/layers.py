"""The decoder layers of a model: the unit of recompute and of compilation."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ingle.errors import ModelError


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The stack of equal blocks between embeddings and last norm; None where none can be told apart."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of equal blocks between embeddings and last norm.

    Raises:
        ModelError: When the architecture has none that can be told apart.
    """
    layers = find_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} has no stack of {model.config.get_text_config().num_hidden_layers} decoder layers "
            "that could be found.",
            where="model.id",
            fix="--train.recompute=false --train.compile=false",
        )
    return layers


def recompute_layers(model: PreTrainedModel) -> None:
    """Lets every decoder layer drop its activations and compute them again in backward.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 3.

    Raises:
        ModelError: When the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute its layers.",
            where="train.recompute = true",
            fix="--train.recompute=false and a smaller --train.micro_batch_size",
        )
    # Its name until 5.23, where that one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
