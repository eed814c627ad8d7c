"""Runs a model up to its output layer, so that the loss need not hold all logits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.models.forward.dealt import put_before
from ingle.models.forward.layout import layout_of
from ingle.models.forward.mixers import base_of, original_class, parameters


class _WithProjection(nn.Module):
    """Goes before the class of a model that names an embedding as its output layer, but has a linear one next to it."""

    projection: str

    def get_output_embeddings(self) -> nn.Module:
        """Returns the linear layer."""
        return self.get_submodule(self.projection)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces it."""
        self.set_submodule(self.projection, value)


def name_projection(model: PreTrainedModel) -> None:
    """Makes a model name its linear output layer if it names the embedding of the targets instead (FSMT).

    Args:
        model: A new model of any device.
    """
    named: Any = model.get_output_embeddings()
    if not isinstance(named, nn.Embedding):
        return
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        if not any(child is named for child in children.values()):
            continue
        for key, child in children.items():
            if isinstance(child, nn.Linear) and child.weight.shape == named.weight.shape:
                put_before(_WithProjection, model)
                changed: Any = model
                changed.projection = f"{path}.{key}".removeprefix(".")
                return


def run_to_head(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    """Returns the input of the output layer; passes the arguments that the model takes."""
    called = model if layout_of(model).has_layers_before_head else base_of(model)
    arguments = taken(called, arguments)
    if called is not model:
        hidden: Tensor = called(**arguments).last_hidden_state
        return hidden
    kept: list[Tensor] = []
    with _replaced_head(model, kept):
        called(**arguments)
    return kept[-1]


class _Keeps(nn.Module):
    """Goes in the place of the output layer: keeps its input, and returns zeros as logits, which are not used.

    A sharded output layer must not be called here: its unit would gather its weights, and lose gradients of an
    embedding that is tied to it, because it is called again for the loss.
    """

    def __init__(self, kept: list[Tensor], num_logits: int) -> None:
        super().__init__()
        self._kept = kept
        self._num_logits = num_logits

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns zeros for the first token of each row."""
        self._kept.append(hidden)
        return hidden.new_zeros(len(hidden), 1, self._num_logits)


@contextmanager
def _replaced_head(model: PreTrainedModel, kept: list[Tensor]) -> Iterator[None]:
    """Keeps what the output layer gets inside the block."""
    layer = model.get_output_embeddings()
    if not hasattr(layer, "out_features"):  # it is the embedding as well
        hook = layer.register_forward_pre_hook(functools.partial(_keep_rows, kept))
        try:
            yield
        finally:
            hook.remove()
        return
    keeps = _Keeps(kept, int(layer.out_features))
    places = [(owner, key) for owner in model.modules() for key, child in owner._modules.items() if child is layer]
    try:
        for owner, key in places:
            owner._modules[key] = keeps
        yield
    finally:
        for owner, key in places:
            owner._modules[key] = layer


def _keep_rows(kept: list[Tensor], _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    if not inputs[0].is_floating_point():
        return inputs[0]
    kept.append(inputs[0])
    return inputs[0][:, :1]  # the logits are not used


def taken(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that the ``forward`` of a module takes."""
    names = parameters(original_class(module))
    return arguments if "kwargs" in names else {name: value for name, value in arguments.items() if name in names}
