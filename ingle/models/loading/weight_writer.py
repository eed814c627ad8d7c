"""Writes weights into a model: finds the place of each parameter, quantizes the value if needed and copies it there.

The model may hold a quantized module where the architecture has a linear layer, an embedding or a stack of experts, and
an adapter may wrap any of them.  Only this file knows how names of the architecture map to places in the model.

All memory of the model is allocated before the first weight is read.  Temporary buffers (a tensor as it is stored, the
encoder's intermediate results) then reuse the same free blocks.  Allocated in turn, the two would fragment memory and
the process would grow to twice the model.
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
from ingle.quant import from_bitnet, from_bitsandbytes, from_hqq
from ingle.quant.catalog import format_options
from ingle.quant.format import PLAIN
from ingle.quant.linear import QuantModule

#: Selects the rows of a parameter to load, from its name, its number of rows and its row group.  Rows are the output
#: rows of a quantized weight, the experts of a stack, and otherwise the first dimension.  Both bounds must be multiples
#: of the row group, or the end.
RowSelector = Callable[[str, int, int], range]


class WeightWriter:
    """Writes tensors into a model under the architecture's names.

    Args:
        model: Some of its modules may be quantized or wrapped by adapters.
        architecture: The unmodified architecture on the meta device; it gives names, shapes and dtypes.
        device: Where tensors go.
        sink: Receives warnings.
        rows: Which rows of each parameter to load; all if None.
        allocate: Allocate memory for everything on the meta device.  Otherwise each weight needs :meth:`allocated`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: PreTrainedModel,
        device: torch.device,
        sink: Sink | None = None,
        *,
        rows: RowSelector | None = None,
        allocate: bool = True,
    ) -> None:
        self._device = device
        self._model = model
        self._architecture = architecture
        self._sink = sink
        self._wanted: dict[str, Tensor] = {**architecture.state_dict(), **dict(architecture.named_buffers())}
        self._rows = {} if rows is None else self._select_rows(rows)
        self._pending: dict[int, nn.Parameter] = {}  # allocated, without a value
        if allocate:
            self._allocate()

    def holder(self, name: str) -> nn.Module:
        """Returns the module that holds a parameter: the quantized one, or the one that owns it."""
        return self._quantized(name) or self._find(name)[0]

    def missing(self) -> list[str]:
        """Returns the names of parameters and buffers without a value; names of tied weights share theirs."""
        found = []
        for name in self._wanted:
            places = self._places(name).values()
            module, leaf = self._find(name)
            buffer = module._buffers.get(leaf)
            if any(id(place) in self._pending for place in places) or (buffer is not None and buffer.is_meta):
                found.append(name)
        return found

    @contextmanager
    def allocated(self, name: str) -> Iterator[nn.Module]:
        """Allocates one parameter of a model without memory while the block runs; yields its holder."""
        holder = self.holder(name)
        parameters, buffers = dict(holder._parameters), dict(holder._buffers)
        for key, old in self._places(name).items():
            holder._parameters[key] = new = nn.Parameter(torch.empty_like(old, device=self._device), False)
            self._pending[id(new)] = new
        try:
            yield holder
        finally:
            holder._parameters.update(parameters)
            holder._buffers.update(buffers)
            self._pending.clear()

    @torch.no_grad()
    def read(self, name: str, stored: StoredTensor) -> None:
        """Reads one tensor from its file, straight into its place where dtype and device allow.

        Only the selected rows are read, unless the format encodes the matrix as one.
        """
        self._require_shape(name, stored.shape, self._wanted[name].shape)
        selected = name in self._rows and self._encodes_by_row(name)
        if selected:
            stored = stored.select_rows(self._rows[name])
        place = self._places(name).get(leaf_of(name))
        fits = place is not None and place.dtype == stored.dtype and tuple(place.shape) == stored.shape
        if place is not None and fits and place.device.type == "cpu" and id(place) in self._pending:
            stored.read_into(place.detach())
            self._finish(name)
        else:
            self._store(name, stored.read(), selected=selected)

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Sets one parameter or buffer from its full value; a quantized module encodes it.

        Raises:
            ModelError: The value has another shape.
            QuantizationError: The value cannot be quantized.
        """
        self._require_shape(name, value.shape, self._wanted[name].shape)
        self._store(name, value)

    @torch.no_grad()
    def put_experts(self, name: str, num_experts: int, read: Callable[[int], Tensor]) -> None:
        """Sets a stacked parameter, one selected expert after the other.

        Args:
            name: The parameter, ``[experts, rows, columns]``.
            num_experts: Experts in the files.
            read: Returns the matrix of an expert.

        Raises:
            ModelError: The number of experts or the shape of a matrix is another.
            QuantizationError: A matrix cannot be quantized.
        """
        wanted = self._wanted[name].shape
        self._require_shape(name, (num_experts, *wanted[1:]), wanted)
        quantized = self._quantized(name)
        for place, expert in enumerate(self._rows.get(name, range(num_experts))):
            value = read(expert)
            self._require_shape(name, (num_experts, *value.shape), wanted)
            if quantized is not None:
                self._encode(quantized, value, f"{name}[{expert}]", place)
            else:
                self._places(name)[leaf_of(name)][place].copy_(value)
        self._finish(name)

    @torch.no_grad()
    def put_quantized(self, name: str, tensors: Mapping[str, Tensor], *, divides: bool = False) -> None:
        """Copies the codes and scales of a checkpoint that is already quantized.

        Args:
            name: The weight, ``...q_proj.weight``.
            tensors: By their keys without the layer's name.
            divides: Whether BitNet's scale divides.

        Raises:
            ModelError: The model holds this weight in another format.
            QuantizationError: The tensors are inconsistent.
        """
        if "weight_scale" in tensors:
            format, planes = from_bitnet(tensors, divides=divides, name=name)
        elif "W_q" in tensors:
            format, planes = from_hqq(tensors, name=name)
        else:
            format, planes = from_bitsandbytes(tensors, name=name)
        quantized = self._quantized(name)
        if quantized is None or quantized.format != format or quantized.transposed:
            raise ModelError(
                f"The checkpoint is already quantized as {format.name} and cannot be loaded in another format.",
                where=f"base.format, at {name}",
                why=f"it is quantized as {format}; "
                + ("this weight would not be quantized" if quantized is None else f"the run needs {quantized.format}"),
                fix=format_options(format),
            )
        self._write(quantized, self._cut(name, planes), name)
        self._finish(name)

    @torch.no_grad()
    def put_gguf(self, weight: GgufWeight) -> None:
        """Sets a parameter from a GGUF file: copies its bytes where the formats match, and else decodes them.

        Raises:
            ModelError: The tensor has another shape, or a type that is not supported.
            QuantizationError: The value cannot be quantized.
        """
        name, tensor = weight.target, weight.tensor
        wanted = self._wanted[name]
        self._require_shape(name, tensor.shape, wanted.shape)
        quantized = self._quantized(name)
        copies = quantized is not None and quantized.format.name == tensor.type_name
        if not copies and tensor.type_name not in PLAIN and self._sink is not None:
            dtype = str(wanted.dtype).removeprefix("torch.")
            self._sink(Warned(f"{name} is {tensor.type_name} in the file and is loaded as {dtype}.", str(tensor.path)))
        selected = name in self._rows and self._encodes_by_row(name)
        rows = self._rows[name] if selected else None
        if quantized is not None and copies:
            self._write(quantized, {"data": weight.row_bytes(rows)}, name)
            self._finish(name)
        else:
            self._store(name, weight.value(wanted.dtype, rows), selected=selected)

    def _store(self, name: str, value: Tensor, *, selected: bool = False) -> None:
        """Sets a parameter or buffer from its value, or with ``selected`` from its selected rows alone."""
        quantized = self._quantized(name)
        if quantized is None:
            self._copy(name, value if selected or name not in self._rows else value[self._slice(name, len(value))])
        elif quantized.num_stacked is None:
            self._encode(quantized, value, name, selected=selected)
        else:
            first = self._rows[name].start if name in self._rows else 0
            for place, part in enumerate(value if selected else value[self._slice(name, len(value))]):
                self._encode(quantized, part, f"{name}[{first + place}]", place)
        self._finish(name)

    def _copy(self, name: str, value: Tensor) -> None:
        module, leaf = self._find(name)
        if leaf in module._buffers:
            module._buffers[leaf] = value.to(device=self._device, dtype=self._wanted[name].dtype)
            return
        place = module.get_parameter(leaf)
        if id(place) not in self._pending:
            place = self._untie(name, value, place)
        place.copy_(value)

    def _encode(
        self, quantized: QuantModule, value: Tensor, name: str, expert: int | None = None, *, selected: bool = False
    ) -> None:
        value = value.to(self._device)
        planes = quantized.format.encode(value.transpose(-1, -2) if quantized.transposed else value, name=name)
        self._write(quantized, planes if selected or expert is not None else self._cut(name, planes), name, expert)

    def _write(
        self, quantized: QuantModule, planes: Mapping[str, Tensor], name: str, expert: int | None = None
    ) -> None:
        for key, plane in planes.items():
            place = quantized.get_parameter(key)
            target = place if expert is None else place[expert]
            self._require_shape(f"{name} ({key})", plane.shape, target.shape)
            assert plane.dtype == target.dtype, f"{name} ({key}) is {plane.dtype}, not {target.dtype}"
            target.copy_(plane)

    def _untie(self, name: str, value: Tensor, shared: nn.Parameter) -> nn.Parameter:
        """Returns the place of a value whose tied partner is already set: the same one if both values agree."""
        if torch.equal(shared, value.to(shared)):
            return shared
        if self._sink is not None:
            self._sink(Warned(f"{name} should be tied to another weight, but the files hold two different values."))
        self._model.all_tied_weights_keys.clear()
        self._model.config.tie_word_embeddings = False
        module, leaf = self._find(name)
        module._parameters[leaf] = own = nn.Parameter(torch.empty_like(shared), shared.requires_grad)
        return own

    def _finish(self, name: str) -> None:
        for place in self._places(name).values():
            self._pending.pop(id(place), None)

    def _select_rows(self, select: RowSelector) -> dict[str, range]:
        """Returns the rows of each parameter to load; names that share a parameter share the rows."""
        chosen: dict[int, range] = {}
        found: dict[str, range] = {}
        for name in self._wanted:
            place = next(iter(self._places(name).values()), None)
            if place is None or place.dim() == 0:
                continue  # a buffer or a single number
            if id(place) not in chosen:
                num_rows, group = len(place), 1
                if (quantized := self._quantized(name)) is not None and quantized.num_stacked is None:
                    num_rows = quantized.out_features
                    group = quantized.format.row_group(num_rows, quantized.in_features)
                chosen[id(place)] = rows = select(name, num_rows, group)
                aligned = rows.start % group == 0 and (rows.stop % group == 0 or rows.stop == num_rows)
                assert rows.step == 1 and 0 <= rows.start <= rows.stop <= num_rows and aligned, (name, rows)
            found[name] = chosen[id(place)]
        return found

    def _encodes_by_row(self, name: str) -> bool:
        """Whether the planes of some rows depend on these rows of the stored tensor alone."""
        quantized = self._quantized(name)
        if quantized is None or quantized.num_stacked is not None:
            return True
        by_row = all(spec.shape[0] == quantized.out_features for spec in quantized.specs.values())
        return by_row and not quantized.transposed

    def _slice(self, name: str, size: int) -> slice:
        """Returns the part of a first dimension of some size that belongs to the selected rows of a parameter."""
        quantized = self._quantized(name)
        num_rows = size if quantized is None or quantized.num_stacked is not None else quantized.out_features
        rows = self._rows.get(name, range(num_rows))
        if size == 1 < num_rows:
            return slice(1)  # one value for the matrix, which every part needs
        return slice(rows.start * size // num_rows, rows.stop * size // num_rows)

    def _cut(self, name: str, planes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if name not in self._rows:
            return planes
        return {key: plane[self._slice(name, len(plane))] for key, plane in planes.items()}

    def _allocate(self) -> None:
        """Allocates everything on the meta device, shared parameters once.

        What the architecture does not have, such as an adapter's parameters, stays uninitialised.
        """
        sizes: dict[int, slice] = {}
        own: set[int] = set()
        for name in self._wanted:
            module, leaf = self._find(name)
            own.add(id(module._buffers.get(leaf)))
            for place in self._places(name).values():
                own.add(id(place))
                if name in self._rows:
                    sizes[id(place)] = self._slice(name, len(place))
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the old ones, so that their ids stay unique
        for module in self._model.modules():
            for key, old in module._parameters.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    like = old[sizes[id(old)]] if id(old) in sizes else old
                    new = nn.Parameter(torch.empty_like(like, device=self._device), requires_grad=old.requires_grad)
                    made[id(old)] = (old, new)
                    if id(old) in own:
                        self._pending[id(new)] = new
                module._parameters[key] = made[id(old)][1]
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and id(buffer) not in own:
                    module._buffers[key] = torch.empty_like(buffer, device=self._device)

    def _places(self, name: str) -> dict[str, nn.Parameter]:
        """Returns the parameters that hold a weight, by their key in its holder; none for a buffer."""
        if (quantized := self._quantized(name)) is not None:
            return {key: quantized.get_parameter(key) for key in quantized.specs}
        module, leaf = self._find(name)
        parameter = module._parameters.get(leaf)
        return {} if parameter is None else {leaf: parameter}

    def _quantized(self, name: str) -> QuantModule | None:
        """Returns the quantized module that holds a parameter: the layer itself, or a child for a stack of experts."""
        module, leaf = self._find(name)
        if isinstance(module, QuantModule) and leaf == "weight":
            return module
        child = module._modules.get(leaf)
        return child if isinstance(child, QuantModule) else None

    def _find(self, name: str) -> tuple[nn.Module, str]:
        """Returns the module that owns a name, inside any adapter that wraps it, and the last part of the name."""
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self._model
        original: nn.Module = self._architecture
        for part in path.split(".") if path else ():
            module, original = getattr(module, part), getattr(original, part)
            while type(module) is not type(original) and isinstance(inner := getattr(module, "base", None), nn.Module):
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
    """Returns the last part of a parameter's path."""
    return name.rpartition(".")[2]
