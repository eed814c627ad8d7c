"""Finds the decoder layers of a model: the units of recompute and compilation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.models.forward.dealt import Dealt
from ingle.models.forward.documents import Boundaries
from ingle.models.forward.layout import boundaries_of, layout_of
from ingle.models.forward.mixers import base_of, original_class, source


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Returns the stack of equal blocks between embeddings and last norm; None if it cannot be identified."""
    num_layers = _num_layers(model)
    return next((stack for stack in _stacks(model) if len(stack) == num_layers), None)


def _num_layers(model: PreTrainedModel) -> int:
    """Returns the number of layers that a token passes; 0 if the config does not name it."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))


def _stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    return [module for module in base_of(model).modules() if isinstance(module, nn.ModuleList) and len(module)]


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the blocks of all stacks that can be recomputed, or else those of the decoder, if it has any."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for stack in stacks for block in stack if hasattr(block, "gradient_checkpointing")]
    inside = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inside] or list(find_layers(model) or [])


def dealt_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Returns the modules that call what is inside them once for each group of documents."""
    return {module for module in model.modules() if isinstance(module, Dealt)}


def read_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Returns the modules whose weights their owner reads without calling them, as DeBERTa's table of distances.

    The output layer, which :func:`ingle.models.through_head` calls, is left out.
    """
    found = set[nn.Module]()
    for owner in model.modules():
        code = source(original_class(owner))
        for key, child in owner.named_children():
            is_read = f"self.{key}.weight" in code and f"self.{key}(" not in code
            if is_read and child is not model.get_output_embeddings():
                found.add(child)
    return found


def layer_uses(model: PreTrainedModel) -> dict[nn.Module, int]:
    """Returns the blocks that a token passes, in their order, and how often: ALBERT repeats a few shared ones.

    Where a config does not say how many layers there are, they are those of the longest stack.
    """
    layers = find_layers(model)
    if layers is not None:
        return Counter(layers)
    num_layers = _num_layers(model)
    repeated = next((stack for stack in _stacks(model) if num_layers % len(stack) == 0), None)
    if num_layers and repeated is not None:
        return dict.fromkeys(repeated, num_layers // len(repeated))
    return dict.fromkeys(max(_stacks(model), key=len, default=()), 1)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the stack of equal blocks between embeddings and last norm.

    Raises:
        ModelError: The stack cannot be identified.
    """
    layers = find_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} has no stack of {_num_layers(model)} decoder layers that Ingle can identify.",
            where="model.id",
            fix="--parallel.recompute=false --train.compile=false",
        )
    return layers


def can_recompute(model: PreTrainedModel) -> bool:
    """Returns whether the architecture supports :func:`recompute_layers`."""
    return bool(model.supports_gradient_checkpointing)


def recompute_layers(
    model: PreTrainedModel, as_now: Callable[[nn.Module], AbstractContextManager[None]] = lambda layer: nullcontext()
) -> None:
    """Makes every decoder layer free its activations and recompute them in backward.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 3.

    Args:
        model: A model.
        as_now: Called in the forward pass of a layer; returns a context for its repetition in backward, in which the
            layer computes what it computes now.

    Raises:
        ModelError: The architecture does not support it.
    """
    if not can_recompute(model):
        raise ModelError(
            f"{type(model).__name__} does not support recomputing its layers.",
            where="parallel.recompute = true",
            fix="use --parallel.recompute=false and a smaller --train.micro_batch_size",
        )
    # transformers renamed the method in 5.23, where the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    boundaries, layout = boundaries_of(model), layout_of(model)
    held = boundaries if layout.dealt or layout.has_distances else None
    layer: Any
    for layer in model.modules():
        again = layer.__dict__.get("_gradient_checkpointing_func")
        if again is not None:
            layer._gradient_checkpointing_func = partial(again, context_fn=partial(_contexts, layer, held, as_now))
            layer.gradient_checkpointing = True  # a layer with another inside passes the function on


def _contexts(
    layer: nn.Module, boundaries: Boundaries | None, as_now: Callable[[nn.Module], AbstractContextManager[None]]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Returns the contexts of a forward pass and of its repetition.

    Another batch, or another function, may have been computed when backward computes a layer of this one again.
    """
    held = nullcontext() if boundaries is None else boundaries.holding(boundaries.current)
    return nullcontext(), _nested(as_now(layer), held)


@contextmanager
def _nested(*contexts: AbstractContextManager[None]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield
