"""Runs a model up to its output layer, so that the loss need not hold all logits."""

from __future__ import annotations

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

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        if not inputs[0].is_floating_point():  # the output layer is the embedding as well
            return inputs[0]
        kept.append(inputs[0])
        return inputs[0][:, :1]  # the logits are not used

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        called(**arguments)
    finally:
        hook.remove()
    return kept[-1]


def taken(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that the ``forward`` of a module takes."""
    names = parameters(original_class(module))
    return arguments if "kwargs" in names else {name: value for name, value in arguments.items() if name in names}
