"""Where a weight goes: from its name in the pristine architecture to its place in the real model.

The real model may hold a quantized module where the architecture has a linear layer, and either may be wrapped by an
adapter.  Only this file knows how the two are matched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.events import Sink, Warned


class Destination:
    """Puts tensors into a model.

    Args:
        model: The real model.
        twin: The pristine architecture on the meta device; it gives names, shapes and types.
        device: Where tensors go.

    Attributes:
        filled: Names that have their value.
    """

    def __init__(self, model: PreTrainedModel, twin: PreTrainedModel, device: torch.device) -> None:
        self.device = device
        self.filled: set[str] = set()
        self._model = model
        self._wanted = twin.state_dict()
        self._wanted.update(dict(twin.named_buffers()))

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Gives one parameter or buffer its value.

        Raises:
            ModelError: When the shape is another.
        """
        wanted = self._wanted[name]
        if value.shape != wanted.shape:
            raise ModelError(
                f"the weight {name} has another shape than the model.",
                where=name,
                why=f"{tuple(value.shape)} in the file, {tuple(wanted.shape)} in the architecture",
                fix="check that the files belong to this config.json",
            )
        module, leaf = self._find(name)
        value = value.to(device=self.device, dtype=wanted.dtype)
        _set(module, leaf, value.contiguous())
        self.filled.add(name)

    def tie(self, tied: dict[str, str], sink: Sink | None) -> None:
        """Lets tied weights be one tensor.

        A checkpoint may hold either name, or both; two different values are kept apart and told.
        """
        for target, source in tied.items():
            if target not in self.filled and source not in self.filled:
                continue  # reported as missing
            have, lack = (source, target) if source in self.filled else (target, source)
            have_module, have_leaf = self._find(have)
            lack_module, lack_leaf = self._find(lack)
            tensor = getattr(have_module, have_leaf)
            if lack in self.filled and not torch.equal(tensor, getattr(lack_module, lack_leaf)):
                if sink is not None:
                    sink(Warned(f"{target} should be tied to {source}, but the files hold two different weights"))
                continue
            setattr(lack_module, lack_leaf, tensor)
            self.filled.add(lack)

    def _find(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self._model
        for part in path.split(".") if path else ():
            module = getattr(module, part)
            while isinstance(inner := getattr(module, "base", None), nn.Module):
                module = inner
        return module, leaf


def _set(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    old = module._parameters[leaf]
    assert old is not None
    module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
