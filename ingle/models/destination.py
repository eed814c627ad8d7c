"""Where a weight goes: from its name in the pristine architecture to its place in the real model.

The real model may hold a packed module where the architecture has a linear layer or a stack of experts, and either
may be wrapped by an adapter.  Only this file knows how the two are matched.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.events import Sink, Warned
from ingle.quant import from_bitsandbytes
from ingle.quant.linear import Packed


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
        self._twin = twin
        self._wanted: dict[str, Tensor] = {**twin.state_dict(), **dict(twin.named_buffers())}

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Gives one parameter or buffer its value; a packed module encodes it.

        Raises:
            ModelError: When the shape is another.
            QuantizationError: When it cannot be packed.
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
        value = value.to(self.device)
        if (packed := _packed(module, leaf)) is not None:
            packed.quantize(value, name=name)
        else:
            _set(module, leaf, value.to(wanted.dtype).contiguous())
        self.filled.add(name)

    @torch.no_grad()
    def put_packed(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Gives a packed module the very bytes of a bitsandbytes checkpoint.

        Args:
            name: The weight, ``...q_proj.weight``.
            tensors: By bitsandbytes' keys without the layer's name.

        Raises:
            ModelError: When the model does not hold this weight in that format.
            QuantizationError: When the bytes make no sense.
        """
        module, leaf = self._find(name)
        format, planes = from_bitsandbytes(tensors, name=name)
        packed = _packed(module, leaf)
        if packed is None or packed.format != format or packed.transposed:
            has = "in the compute type" if packed is None else f"as {packed.format}"
            raise ModelError(
                f"the checkpoint is already packed as {format.name} and cannot be held {has}.",
                where=f"base.format, at {name}",
                why=f"it is packed as {format}",
                fix=_option(format),
            )
        packed.assign({key: plane.to(self.device) for key, plane in planes.items()})
        self.filled.add(name)

    def tie(self, tied: Mapping[str, str], sink: Sink | None) -> None:
        """Lets tied weights be one tensor.

        A checkpoint may hold either name, or both; two different values are kept apart and told.
        """
        for target, source in tied.items():
            if target not in self.filled and source not in self.filled:
                continue  # told as missing
            have, lack = (source, target) if source in self.filled else (target, source)
            have_module, have_leaf = self._find(have)
            lack_module, lack_leaf = self._find(lack)
            tensor = getattr(have_module, have_leaf)
            if lack in self.filled and not torch.equal(tensor, getattr(lack_module, lack_leaf)):
                if sink is not None:
                    sink(Warned(f"{target} should be tied to {source}, but the files hold two different weights"))
                self._model.all_tied_weights_keys.pop(target, None)
                self._model.config.tie_word_embeddings = False
                continue
            setattr(lack_module, lack_leaf, tensor)
            self.filled.add(lack)

    def _find(self, name: str) -> tuple[nn.Module, str]:
        """The module that owns a name, inside whatever an adapter has wrapped around it."""
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self._model
        pristine: nn.Module = self._twin
        for part in path.split(".") if path else ():
            module, pristine = getattr(module, part), getattr(pristine, part)
            while type(module) is not type(pristine) and isinstance(inner := getattr(module, "base", None), nn.Module):
                module = inner
        return module, leaf


def _packed(module: nn.Module, leaf: str) -> Packed | None:
    """The packed module that stands for a parameter: itself for a linear layer, a child for a stack of experts."""
    if isinstance(module, Packed) and leaf == "weight":
        return module
    child = module._modules.get(leaf)
    return child if isinstance(child, Packed) else None


def _set(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    old = module._parameters[leaf]
    assert old is not None
    module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)


def _option(format: object) -> str:
    options = " ".join(
        f"--base.{key}={str(getattr(format, key)).lower()}"
        for key in ("block_size", "double_quant")
        if hasattr(format, key)
    )
    return f"--base.format={getattr(format, 'name', '')} {options}".strip()
