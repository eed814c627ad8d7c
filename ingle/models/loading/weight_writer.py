"""Writes weights into a model: converts or quantizes each value and copies it to its place.

All memory of the model is allocated before the first weight is read. Temporary buffers (a stored tensor, the encoder's
intermediate results) then reuse the same free blocks. Alternating the two kinds of allocations would fragment memory,
and the process would grow to twice the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.events import Sink, Warned
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.safetensors_files import StoredTensor
from ingle.models.loading.slots import Slot, find_slots
from ingle.parallel import adopt_allocated, allocated, copy_rows
from ingle.quant import from_bitnet, from_bitsandbytes, from_hqq, from_mxfp4
from ingle.quant.catalog import format_options
from ingle.quant.format import PLAIN


class WeightWriter:
    """Writes tensors into a model under the architecture's names.

    Args:
        model: Some of its modules may be quantized or wrapped by adapters.
        architecture: The unmodified architecture on the meta device; defines names, shapes and dtypes.
        device: Device of the weights.
        sink: Receives warnings.
        allocate: Allocate all parameters now. Otherwise each weight needs :meth:`allocated`.
        offload: Keep sharded parameters in host memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: PreTrainedModel,
        device: torch.device,
        sink: Sink | None = None,
        *,
        allocate: bool = True,
        offload: bool = False,
    ) -> None:
        self._model = model
        self._device = device
        self._sink = sink
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._slots = find_slots(model, architecture)
        self._pending: dict[int, nn.Parameter] = {}  # allocated, without a value
        if allocate:
            self._allocate(offload=offload)

    def holder(self, name: str) -> nn.Module:
        """Returns the module of a parameter: the quantized one, or its owner."""
        slot = self._slots[name]
        return slot.quantized or slot.owner

    def missing(self) -> list[str]:
        """Returns the names of parameters and buffers without a value; tied weights share theirs."""
        return [
            name
            for name, slot in self._slots.items()
            if any(id(parameter) in self._pending for parameter in slot.parameters().values())
            or (slot.is_buffer and slot.owner.get_buffer(slot.leaf).is_meta)
        ]

    @contextmanager
    def allocated(self, name: str) -> Iterator[nn.Module]:
        """Replaces one parameter by a full one in host memory while the block runs; yields its holder.

        The value is lost at the end of the block, unless :meth:`targets` has returned it.
        """
        slot, holder = self._slots[name], self.holder(name)
        parameters, buffers = dict(holder._parameters), dict(holder._buffers)
        full = {
            key: nn.Parameter(torch.empty(old.shape, dtype=slot.dtype_of(old), device="cpu"), requires_grad=False)
            for key, old in slot.parameters().items()
        }
        self._pending.update({id(new): new for new in full.values()})
        holder._parameters.update(full)
        try:
            yield holder
        finally:
            holder._parameters.update(parameters)
            holder._buffers.update(buffers)
            for new in full.values():
                self._pending.pop(id(new), None)

    def targets(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors that store a parameter or buffer, by their paths in the model."""
        slot = self._slots[name]
        path = self._paths[id(self.holder(name))]
        values: dict[str, Tensor] = dict(slot.parameters())
        if slot.is_buffer:
            value = slot.owner.get_buffer(slot.leaf)
            if value.is_meta:
                value = slot.owner._buffers[slot.leaf] = torch.empty_like(value, device=self._device)
            values[slot.leaf] = value
        return {f"{path}.{key}".lstrip("."): value for key, value in values.items()}

    def num_bytes(self, name: str) -> int:
        """Returns the bytes of a full parameter or buffer as the architecture defines it."""
        return self._slots[name].wanted.nbytes

    def is_tied_to_set(self, name: str) -> bool:
        """Returns whether a parameter is not quantized and has the value of the one that it is tied to."""
        slot = self._slots[name]
        parameters = slot.parameters().values()
        return slot.quantized is None and bool(parameters) and not any(id(p) in self._pending for p in parameters)

    def finish(self, name: str) -> None:
        """Declares that a parameter has its value."""
        self._finish(self._slots[name])

    @torch.no_grad()
    def read(self, name: str, stored: StoredTensor) -> None:
        """Reads one tensor from its file, directly into its parameter if dtype and device allow."""
        slot = self._slots[name]
        slot.require_shape(stored.shape)
        place = None if slot.quantized is not None else slot.owner._parameters.get(slot.leaf)
        if (
            place is not None
            and place.device.type == "cpu"
            and (place.dtype, tuple(place.shape)) == (stored.dtype, stored.shape)
            and id(place) in self._pending
        ):
            stored.read_into(place.detach())
            self._finish(slot)
        else:
            self._store(slot, stored.read())

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Sets one parameter or buffer from its full value; a quantized module encodes it.

        Raises:
            ModelError: The value has another shape.
            QuantizationError: The value cannot be quantized.
        """
        self._slots[name].require_shape(value.shape)
        self._store(self._slots[name], value)

    @torch.no_grad()
    def put_experts(self, name: str, num_experts: int, read: Callable[[int], Tensor]) -> None:
        """Sets a stacked parameter, one expert at a time.

        Args:
            name: The parameter, ``[experts, rows, columns]``.
            num_experts: Experts in the files.
            read: Returns the matrix of an expert.

        Raises:
            ModelError: The number of experts or the shape of a matrix differs from the model's.
            QuantizationError: A matrix cannot be quantized.
        """
        slot = self._slots[name]
        slot.require_shape((num_experts, *slot.wanted.shape[1:]))
        for expert in range(num_experts):
            value = read(expert)
            slot.require_shape((num_experts, *value.shape))
            if slot.quantized is not None:
                self._encode(slot, value, expert)
            else:
                slot.owner.get_parameter(slot.leaf)[expert].copy_(value)
        self._finish(slot)

    @torch.no_grad()
    def put_quantized(self, name: str, tensors: Mapping[str, Tensor], *, divides: bool = False) -> None:
        """Copies the codes and scales of a checkpoint that is already quantized.

        Args:
            name: The weight, ``...q_proj.weight``.
            tensors: By their keys without the layer's name.
            divides: Whether BitNet weights are divided by their scale rather than multiplied.

        Raises:
            ModelError: The model needs this weight in another format.
            QuantizationError: The tensors are inconsistent.
        """
        if "weight_scale" in tensors:
            format, planes = from_bitnet(tensors, divides=divides, name=name)
        elif "blocks" in tensors:
            format, planes = from_mxfp4(tensors, name=name)
        elif "W_q" in tensors:
            format, planes = from_hqq(tensors, name=name)
        else:
            format, planes = from_bitsandbytes(tensors, name=name)
        slot = self._slots[name]
        quantized = slot.quantized
        # Experts in MXFP4 are stored as rows of outputs, however the architecture stores them.
        is_turned = quantized is not None and quantized.transposed and "blocks" not in tensors
        if quantized is None or quantized.format != format or is_turned:
            raise ModelError(
                f"The checkpoint is already quantized as {format.name} and cannot be loaded in another format.",
                where=f"base.format, at {name}",
                why=f"it is quantized as {format}; "
                + ("this weight would not be quantized" if quantized is None else f"the run needs {quantized.format}"),
                fix=format_options(format),
            )
        self._write(slot, planes)
        self._finish(slot)

    @torch.no_grad()
    def put_gguf(self, weight: GgufWeight) -> None:
        """Sets a parameter from a GGUF file: copies the bytes if the formats match, otherwise dequantizes them.

        Raises:
            ModelError: The tensor has another shape, or a type that is not supported.
            QuantizationError: The value cannot be quantized.
        """
        slot = self._slots[weight.target]
        slot.require_shape(weight.shape)
        if slot.quantized is not None and slot.quantized.format.name == weight.format_name:
            self._write(slot, weight.planes())
            self._finish(slot)
            return
        types = sorted({tensor.type_name for tensor in weight.tensors} - set(PLAIN))
        if types and self._sink is not None:
            dtype = str(slot.wanted.dtype).removeprefix("torch.")
            message = f"{slot.name} is {' and '.join(types)} in the file and is loaded as {dtype}."
            self._sink(Warned(message, str(weight.tensor.path)))
        self._store(slot, weight.value(slot.wanted.dtype))

    def _store(self, slot: Slot, value: Tensor) -> None:
        """Sets a parameter or buffer from its value."""
        if slot.matrix is not None:
            self._encode(slot, value)
        elif slot.quantized is not None:
            for place, part in enumerate(value):
                self._encode(slot, part, place)
        elif slot.is_buffer:
            slot.owner._buffers[slot.leaf] = value.to(device=self._device, dtype=slot.wanted.dtype)
        else:
            target = slot.owner.get_parameter(slot.leaf)
            if id(target) not in self._pending:
                target = self._untie(slot, value, target)
            copy_rows(target, value)
        self._finish(slot)

    def _encode(self, slot: Slot, value: Tensor, place: int | None = None) -> None:
        """Quantizes a matrix, or with ``place`` one of a stack."""
        assert slot.quantized is not None
        format, value = slot.quantized.format, value.to(self._device)
        name = slot.name if place is None else f"{slot.name}[{place}]"
        planes = format.encode(value.transpose(-1, -2) if slot.quantized.transposed else value, name=name)
        self._write(slot, planes, place)

    def _write(self, slot: Slot, planes: Mapping[str, Tensor], place: int | None = None) -> None:
        parameters = slot.parameters()
        for key, plane in planes.items():
            target = parameters[key] if place is None else parameters[key][place]
            slot.require_shape(plane.shape, target.shape, f" ({key})")
            assert plane.dtype == target.dtype, f"{slot.name} ({key}) is {plane.dtype}, not {target.dtype}"
            copy_rows(target, plane)

    def _untie(self, slot: Slot, value: Tensor, shared: nn.Parameter) -> nn.Parameter:
        """Returns the parameter for a value whose tied partner is already set: the shared one if both values agree."""
        if torch.equal(shared, value.to(shared)):
            return shared
        if self._sink is not None:
            message = f"{slot.name} should be tied to another weight, but the files contain two different values."
            self._sink(Warned(message))
        self._model.all_tied_weights_keys.clear()
        self._model.config.tie_word_embeddings = False
        slot.owner._parameters[slot.leaf] = own = nn.Parameter(torch.empty_like(shared), shared.requires_grad)
        return own

    def _finish(self, slot: Slot) -> None:
        for parameter in slot.parameters().values():
            self._pending.pop(id(parameter), None)

    def _allocate(self, *, offload: bool) -> None:
        """Allocates everything on the meta device, shared parameters once, and of sharded ones the rows of this rank.

        Parameters that the architecture does not have, such as an adapter's, stay uninitialized.
        """
        slots = {id(parameter): slot for slot in self._slots.values() for parameter in slot.parameters().values()}
        buffers = {id(slot.owner._buffers[slot.leaf]) for slot in self._slots.values() if slot.is_buffer}
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the old ones, so that their ids stay unique
        for module in self._model.modules():
            for key, old in module._parameters.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    new = allocated(old, self._device, offload=offload)
                    made[id(old)] = (old, new)
                    if id(old) in slots:
                        self._pending[id(new)] = new
                module._parameters[key] = made[id(old)][1]
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and id(buffer) not in buffers:
                    module._buffers[key] = torch.empty_like(buffer, device=self._device)
        adopt_allocated(self._model)
