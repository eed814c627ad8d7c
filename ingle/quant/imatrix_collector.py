"""Collects importance matrices: the mean square of every input column of every linear layer while a model runs.

llama.cpp's ``imatrix`` tool computes the same importance. Formats that search for scales weight the squared error of a
weight by the importance of its column. Collecting does not change results or gradients.

Source: llama.cpp, ``tools/imatrix``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ingle.errors import QuantizationError
from ingle.kernels.layers.importance import Gate, SquaredInputs, observe
from ingle.quant.conversion import is_conv1d
from ingle.quant.linear import QuantLinear


@dataclass(frozen=True)
class Importance:
    """Statistics of the inputs of one linear layer.

    Attributes:
        sums: Sum of squares of each input column, float64 ``[I]``.
        count: Number of tokens in the sums.
    """

    sums: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The importance of each column, float32 ``[I]``; ones if there were no tokens.

        Sums are rounded before the division, as in a file, so that both lead to the same quantized bytes.
        """
        if not self.count:
            return torch.ones(self.sums.shape)
        return self.sums.float() / self.count


class ImatrixCollector:
    """Observes every linear layer of a model except the output head.

    Fused experts are not observed, because their tokens do not pass through separate linear layers.

    Args:
        model: The model as it will run: with adapters attached and layers fused.
        add: Returns the sum of a float64 tensor over the ranks of a run, each of which has a collector; all ranks then
            call all methods together. None for one process.
        is_main: Whether this collector continues a restored state; those of other ranks start from zero.
    """

    def __init__(
        self, model: nn.Module, *, add: Callable[[Tensor], Tensor] | None = None, is_main: bool = True
    ) -> None:
        self._add = add
        self._is_main = is_main
        self._gate = Gate()
        self._inputs: dict[str, SquaredInputs] = {}
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []
        for name, module in linear_maps(model).items():
            inputs = SquaredInputs(matrix_shape(module)[1], self._gate)
            self._inputs[f"{name}.weight"] = inputs
            # Fused layers use their parts without calling them, so they read this attribute instead of running hooks.
            module.squared_inputs = inputs  # type: ignore[assignment]
            self._hooks.append((module, module.register_forward_pre_hook(_make_hook(inputs))))

    @contextmanager
    def opened(self, num_tokens: int) -> Iterator[None]:
        """Counts the inputs of the forward pass inside the block.

        Args:
            num_tokens: Number of rows that are tokens; the rows after them are padding.
        """
        with self._gate.opened(num_tokens):
            yield

    def entries(self) -> dict[str, Importance]:
        """Returns the statistics by the weight's name without adapters (``...q_proj.weight``)."""
        return {name: Importance(sums, count) for name, (sums, count) in self._totals().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything that :meth:`load_state_dict` needs to continue bit for bit."""
        totals = self._totals()
        counts = [count for _, count in totals.values()]
        return {f"sums.{name}": sums for name, (sums, _) in totals.items()} | {
            "counts": torch.tensor(counts, dtype=torch.int64)
        }

    def _totals(self) -> dict[str, tuple[Tensor, int]]:
        """Returns the sums and counts over all ranks."""
        if self._add is None:
            return {name: (inputs.sums.clone(), inputs.count) for name, inputs in self._inputs.items()}
        parts = [part for each in self._inputs.values() for part in (each.sums, torch.tensor([float(each.count)]))]
        added = self._add(torch.cat([part.double() for part in parts])).split([len(part) for part in parts])
        return {
            name: (sums.clone(), int(count))
            for name, sums, count in zip(self._inputs, added[::2], added[1::2], strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            QuantizationError: The state belongs to another model.
        """
        if set(state) != set(self.state_dict()) or len(state["counts"]) != len(self._inputs):
            raise QuantizationError("The importance matrix in the checkpoint belongs to another model.")
        for (name, inputs), count in zip(self._inputs.items(), state["counts"].tolist(), strict=True):
            inputs.sums, inputs.count = state[f"sums.{name}"].clone(), count
            if not self._is_main:
                inputs.sums.zero_()
                inputs.count = 0

    def remove(self) -> None:
        """Removes all hooks."""
        for module, handle in self._hooks:
            handle.remove()
            del module.squared_inputs
        self._hooks.clear()


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the module that is called for every linear layer except the output head.

    Keys are names without adapters; the value is the adapter's module if there is one.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if ".tuner." in name:  # a part of one of PEFT's layers
            continue
        inner = getattr(module, "base", None)
        if _is_linear(module) and module is not head and not name.endswith(".base"):
            found[name] = module
        elif isinstance(inner, nn.Module) and _is_linear(inner) and inner is not head:
            found[name] = module  # an adapter that wraps a linear layer
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantLinear) or is_conv1d(module)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Returns the numbers of outputs and inputs of a linear layer, or of an adapter around one."""
    if is_conv1d(module):
        inputs, outputs = module.get_parameter("weight").shape
        return outputs, inputs
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _make_hook(inputs: SquaredInputs) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        observe(arguments[0], [inputs])

    return hook
