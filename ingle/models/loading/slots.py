"""Maps names of the architecture to places in a model.

The model may have a quantized module where the architecture has a linear layer, an embedding or a stack of experts, and
an adapter may wrap any of them. Only this module knows how the two correspond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.quant.linear import QuantModule

#: Selects the rows of a parameter to load, from its name, its number of rows and its row group. Rows are the output
#: rows of a quantized weight, the experts of a stack, and otherwise the first dimension. Both bounds must be multiples
#: of the row group, or the end.
RowSelector = Callable[[str, int, int], range]


@dataclass(slots=True)
class Slot:
    """The place of a parameter or buffer.

    Attributes:
        name: Its name in the architecture.
        wanted: The architecture's tensor on the meta device.
        owner: The module that owns the name.
        quantized: The module that stores it quantized: the owner, or the owner's child for a stack of experts.
        rows: The rows to load; all if None.
    """

    name: str
    wanted: Tensor
    owner: nn.Module
    quantized: QuantModule | None
    rows: range | None = None

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return leaf_of(self.name)

    @property
    def is_buffer(self) -> bool:
        """Whether the name is that of a buffer of the owner."""
        return self.leaf in self.owner._buffers

    @property
    def matrix(self) -> QuantModule | None:
        """The quantized module if it stores a single matrix; None for a stack."""
        return self.quantized if self.quantized is not None and self.quantized.num_stacked is None else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that store the value, by their key in the module; empty for a buffer."""
        if self.quantized is not None:
            return {key: self.quantized.get_parameter(key) for key in self.quantized.specs}
        parameter = self.owner._parameters.get(self.leaf)
        return {} if parameter is None else {self.leaf: parameter}

    def select(self, selector: RowSelector) -> range:
        """Returns the rows to load."""
        num_rows, group = self.wanted.shape[0], 1
        if (matrix := self.matrix) is not None:
            num_rows, group = matrix.out_features, matrix.format.row_group(matrix.out_features, matrix.in_features)
        rows = selector(self.name, num_rows, group)
        aligned = rows.start % group == 0 and (rows.stop % group == 0 or rows.stop == num_rows)
        assert rows.step == 1 and 0 <= rows.start <= rows.stop <= num_rows and aligned, (self.name, rows)
        return rows

    def encodes_by_row(self) -> bool:
        """Returns whether some rows can be encoded without the other rows of the stored tensor."""
        if (matrix := self.matrix) is None:
            return True
        by_row = all(spec.shape[0] == matrix.out_features for spec in matrix.specs.values())
        return by_row and not matrix.transposed

    def cut(self, value: Tensor) -> Tensor:
        """Returns the part of a full value, or of a plane of a matrix, that belongs to the selected rows."""
        if self.rows is None or value.dim() == 0:
            return value
        size = len(value)
        num_rows = size if self.matrix is None else self.matrix.out_features
        if size == 1 < num_rows:
            return value  # one number for the matrix, which every part needs
        return value[self.rows.start * size // num_rows : self.rows.stop * size // num_rows]

    def require_shape(self, have: tuple[int, ...], want: tuple[int, ...] | None = None, part: str = "") -> None:
        """Refuses a value whose shape is not ``want``, by default the architecture's.

        Raises:
            ModelError: It names both shapes.
        """
        want = tuple(self.wanted.shape if want is None else want)
        if tuple(have) != want:
            raise ModelError(
                f"The weight {self.name}{part} does not have the shape that the model needs.",
                where=self.name,
                why=f"{tuple(have)} in the file, {want} in the architecture",
                fix="check that the files belong to this config.json",
            )


def find_slots(model: PreTrainedModel, architecture: PreTrainedModel, select: RowSelector | None) -> dict[str, Slot]:
    """Returns the place in a model of every parameter and buffer of its architecture; tied names select rows once."""
    slots: dict[str, Slot] = {}
    chosen: dict[int, range] = {}
    for name, wanted in {**architecture.state_dict(), **dict(architecture.named_buffers())}.items():
        owner = _find_owner(name, model, architecture)
        child = owner if leaf_of(name) == "weight" else owner._modules.get(leaf_of(name))
        slots[name] = slot = Slot(name, wanted, owner, child if isinstance(child, QuantModule) else None)
        first = next(iter(slot.parameters().values()), None)
        if select is not None and first is not None and wanted.dim() > 0:
            if id(first) not in chosen:
                chosen[id(first)] = slot.select(select)
            slot.rows = chosen[id(first)]
    return slots


def leaf_of(name: str) -> str:
    """Returns the last part of a parameter's path."""
    return name.rpartition(".")[2]


def _find_owner(name: str, model: nn.Module, architecture: nn.Module) -> nn.Module:
    """Returns the module that owns a name, inside any adapter that wraps it."""
    for part in name.split(".")[:-1]:
        model, architecture = getattr(model, part), getattr(architecture, part)
        while type(model) is not type(architecture) and isinstance(inner := getattr(model, "base", None), nn.Module):
            model = inner
    return model
