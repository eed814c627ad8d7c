"""Where a weight goes: from its name in the pristine architecture to its place in the real model.

The real model may hold a packed module where the architecture has a linear layer or a stack of experts, and either
may be wrapped by an adapter.  Only this file knows how the two are matched.

All memory of the model is asked for before the first weight is read, and weights are written into it.  What is needed
on the way (a tensor as it is on disk, the encoder's intermediate results) then always finds the same free place; asked
for in turns, the two would leave holes in each other's memory and the process would grow to twice the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.events import Sink, Warned
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.safetensors_files import StoredTensor
from ingle.quant import from_bitnet, from_bitsandbytes, from_hqq
from ingle.quant.catalog import format_options
from ingle.quant.format import PLAIN
from ingle.quant.linear import QuantModule


class Destination:
    """Puts tensors into a model.

    Args:
        model: The real model; its meta parameters get memory at once.
        twin: The pristine architecture on the meta device; it gives names, shapes and types.
        device: Where tensors go.
        sink: Told of weights that should be tied and are not.
        empty: Leave the model without memory; each weight then needs its :meth:`room`.

    Attributes:
        device: Where tensors go.
        filled: Names that have their value.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        twin: PreTrainedModel,
        device: torch.device,
        sink: Sink | None = None,
        *,
        empty: bool = False,
    ) -> None:
        self.device = device
        self.filled: set[str] = set()
        self._model = model
        self._twin = twin
        self._sink = sink
        self._wanted: dict[str, Tensor] = {**twin.state_dict(), **dict(twin.named_buffers())}
        self._empty = {} if empty else _materialize(model, device)

    def holder(self, name: str) -> nn.Module:
        """The module that holds a parameter: a packed one, or the one whose parameter it is."""
        return self._packed(name) or self._find(name)[0]

    @contextmanager
    def room(self, name: str) -> Iterator[nn.Module]:
        """Gives one parameter of a model without memory its own while the block runs; yields its holder."""
        holder = self.holder(name)
        parameters, buffers = dict(holder._parameters), dict(holder._buffers)
        for key in holder.specs if isinstance(holder, QuantModule) and not name.endswith(".bias") else (leaf_of(name),):
            old = parameters.get(key)
            if old is not None:
                holder._parameters[key] = new = nn.Parameter(torch.empty_like(old, device=self.device), False)
                self._empty[id(new)] = new
        try:
            yield holder
        finally:
            holder._parameters.update(parameters)
            holder._buffers.update(buffers)
            self._empty.clear()

    @torch.no_grad()
    def read(self, name: str, stored: StoredTensor) -> None:
        """Reads one tensor, straight into its place where type and device allow it; else see :meth:`put`."""
        module, leaf = self._find(name)
        place = module._parameters.get(leaf)
        fits = place is not None and place.dtype == stored.dtype and tuple(place.shape) == stored.shape
        if place is not None and fits and place.device.type == "cpu" and id(place) in self._empty:
            stored.read_into(place.detach())
            self._done(name, place)
        else:
            self.put(name, stored.read())

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Gives one parameter or buffer its value; a packed module encodes it.

        Raises:
            ModelError: When the shape is another.
            QuantizationError: When it cannot be packed.
        """
        if value.dim() == 3 and (packed := self._packed(name)) is not None:
            for expert in range(len(value)):
                self.put_expert(name, expert, value[expert])
            self.filled.add(name)
            return
        self._require_shape(name, value.shape, self._wanted[name].shape)
        module, leaf = self._find(name)
        if (packed := self._packed(name)) is not None:
            self._encode(packed, value, name)
            self.filled.add(name)
        elif leaf in module._buffers:
            wanted = self._wanted[name]
            module._buffers[leaf] = value.to(device=self.device, dtype=wanted.dtype)
            self.filled.add(name)
        else:
            place = module.get_parameter(leaf)
            if id(place) not in self._empty:
                place = self._untie(name, value, place)
            place.copy_(value)
            self._done(name, place)

    @torch.no_grad()
    def put_expert(self, name: str, expert: int, value: Tensor) -> None:
        """Gives one expert of a fused parameter its value; :meth:`finish_experts` follows the last.

        Raises:
            ModelError: When the shape is another.
            QuantizationError: When it cannot be packed.
        """
        self._require_shape(name, (1, *value.shape), (1, *self._wanted[name].shape[1:]))
        if (packed := self._packed(name)) is not None:
            self._encode(packed, value, f"{name}[{expert}]", expert)
        else:
            module, leaf = self._find(name)
            module.get_parameter(leaf)[expert].copy_(value)

    def finish_experts(self, name: str, count: int) -> None:
        """Takes note that all experts of a fused parameter are there.

        Raises:
            ModelError: When there are more or fewer than the architecture has.
        """
        wanted = self._wanted[name].shape
        self._require_shape(name, (count, *wanted[1:]), wanted)
        module, leaf = self._find(name)
        place = module._parameters.get(leaf)
        if place is not None:
            self._done(name, place)
        self.filled.add(name)

    @torch.no_grad()
    def put_quantized(self, name: str, tensors: Mapping[str, Tensor], *, divides: bool = False) -> None:
        """Gives a packed module the very codes and scales of a checkpoint that holds packed weights.

        Args:
            name: The weight, ``...q_proj.weight``.
            tensors: By their keys without the layer's name.
            divides: Whether BitNet's scale divides.

        Raises:
            ModelError: When the model does not hold this weight in that format.
            QuantizationError: When the bytes make no sense.
        """
        if "weight_scale" in tensors:
            format, planes = from_bitnet(tensors, divides=divides, name=name)
        elif "W_q" in tensors:
            format, planes = from_hqq(tensors, name=name)
        else:
            format, planes = from_bitsandbytes(tensors, name=name)
        packed = self._packed(name)
        if packed is None or packed.format != format or packed.transposed:
            raise ModelError(
                f"The checkpoint is already packed as {format.name} and cannot be held in another format.",
                where=f"base.format, at {name}",
                why=f"it is packed as {format}; "
                + ("this weight is not packed" if packed is None else f"the model wants {packed.format}"),
                fix=format_options(format),
            )
        self._write(packed, planes, name)
        self.filled.add(name)

    @torch.no_grad()
    def put_gguf(self, weight: GgufWeight) -> None:
        """Gives a parameter what a GGUF file holds: its bytes where they are wanted packed so, else its value.

        Raises:
            ModelError: When the shape is another, or the type is not read.
            QuantizationError: When it cannot be packed.
        """
        name, tensor = weight.target, weight.tensor
        wanted = self._wanted[name]
        self._require_shape(name, tensor.shape, tuple(wanted.shape))
        packed = self._packed(name)
        if packed is not None and packed.format.name == tensor.type_name:
            self._write(packed, {"data": weight.rows()}, name)
            self.filled.add(name)
            return
        if tensor.type_name not in PLAIN and self._sink is not None:
            dtype = str(wanted.dtype).removeprefix("torch.")
            self._sink(Warned(f"{name} is {tensor.type_name} in the file and is held in {dtype}", str(tensor.path)))
        self.put(name, weight.value(wanted.dtype))

    def finish(self) -> None:
        """Notes that tied names share their value.

        Afterwards :meth:`missing` is empty for a complete checkpoint.
        """
        for name in self._wanted:
            module, leaf = self._find(name)
            packed = self._packed(name)
            places = [module._parameters.get(leaf)] if packed is None else list(packed.planes().values())
            if all(place is not None and id(place) not in self._empty for place in places):
                self.filled.add(name)

    def left(self) -> int:
        """Parameters that have memory and no value."""
        return len(self._empty)

    def _encode(self, packed: QuantModule, value: Tensor, name: str, expert: int | None = None) -> None:
        value = value.to(self.device)
        planes = packed.format.encode(value.transpose(-1, -2) if packed.transposed else value, name=name)
        self._write(packed, planes, name, expert)

    def _write(self, packed: QuantModule, planes: Mapping[str, Tensor], name: str, expert: int | None = None) -> None:
        for key, plane in planes.items():
            place = packed.get_parameter(key)
            target = place if expert is None else place[expert]
            self._require_shape(f"{name} ({key})", plane.shape, target.shape)
            assert plane.dtype == target.dtype, f"{name} ({key}) is {plane.dtype}, not {target.dtype}"
            target.copy_(plane)
            self._empty.pop(id(place), None)

    def _untie(self, name: str, value: Tensor, shared: nn.Parameter) -> nn.Parameter:
        """A place for a value whose tied partner is there already: the same one if both agree."""
        if torch.equal(shared, value.to(shared)):
            return shared
        if self._sink is not None:
            self._sink(Warned(f"{name} should be tied to another weight, but the files hold two different values"))
        self._model.all_tied_weights_keys.clear()
        self._model.config.tie_word_embeddings = False
        module, leaf = self._find(name)
        module._parameters[leaf] = own = nn.Parameter(torch.empty_like(shared), shared.requires_grad)
        return own

    def _done(self, name: str, place: nn.Parameter) -> None:
        self.filled.add(name)
        self._empty.pop(id(place), None)

    def _packed(self, name: str) -> QuantModule | None:
        """The packed module that stands for a parameter: the layer itself, or a child for a stack of experts."""
        module, leaf = self._find(name)
        if isinstance(module, QuantModule) and leaf == "weight":
            return module
        child = module._modules.get(leaf)
        return child if isinstance(child, QuantModule) else None

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

    def _require_shape(self, name: str, have: tuple[int, ...], want: tuple[int, ...]) -> None:
        if tuple(have) != tuple(want):
            raise ModelError(
                f"The weight {name} has another shape than the model.",
                where=name,
                why=f"{tuple(have)} in the file, {tuple(want)} in the architecture",
                fix="check that the files belong to this config.json",
            )


def leaf_of(name: str) -> str:
    """The last part of a parameter's path."""
    return name.rpartition(".")[2]


def _materialize(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """Gives memory to every meta parameter, tied ones together; the new ones by identity."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for key, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                new = nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
                made[id(old)] = (old, new)
            module._parameters[key] = made[id(old)][1]
    return {id(new): new for _, new in made.values()}
