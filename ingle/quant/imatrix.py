"""Importance matrices: how strongly each input column of every linear map is driven, gathered while a model runs.

The importance of a column is the mean square of what it was given, as llama.cpp's ``imatrix`` tool defines it; formats
that search for scales weigh the squared error of a weight by that of its column.  A collector is a bystander: it
changes no value, no path and no gradient.

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
    """What one linear map was given.

    Attributes:
        sums: Sum of squares of each input column, float64 ``[I]``.
        count: Tokens summed over.
    """

    sums: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The importance of each column, float32 ``[I]``; ones where no token came by.

        Sums are rounded before they are divided, as in a file, so that either gives the same bytes of a weight.
        """
        if not self.count:
            return torch.ones(self.sums.shape)
        return self.sums.float() / self.count


class ImatrixCollector:
    """Watches every linear map of a model but its output head.

    Fused experts are not watched: their tokens go through no linear map of their own.

    Args:
        model: The model, as it will run: adapters attached, layers fused.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gate = Gate()
        self._maps: dict[str, SquaredInputs] = {}
        self._watched: list[tuple[nn.Module, RemovableHandle]] = []
        for name, module in linear_maps(model).items():
            inputs = SquaredInputs(_in_features(module), self._gate)
            self._maps[f"{name}.weight"] = inputs
            # Read by fused layers, which use their parts without calling them; everything else runs the hook.
            module.squared_inputs = inputs  # type: ignore[assignment]
            self._watched.append((module, module.register_forward_pre_hook(_hook(inputs))))

    @contextmanager
    def opened(self, num_tokens: int) -> Iterator[None]:
        """Counts the inputs of the forward pass inside the block.

        Args:
            num_tokens: Rows that are tokens; what follows them is padding.
        """
        with self._gate.opened(num_tokens):
            yield

    def entries(self) -> dict[str, Importance]:
        """What was gathered, by the weight's name without any adapter (``...q_proj.weight``)."""
        return {name: Importance(inputs.sums.clone(), inputs.count) for name, inputs in self._maps.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`load_state_dict` needs to go on to the bit."""
        state = {f"sums.{name}": inputs.sums for name, inputs in self._maps.items()}
        counts = [inputs.count for inputs in self._maps.values()]
        return state | {"counts": torch.tensor(counts, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            QuantizationError: The state is of another model.
        """
        if set(state) != set(self.state_dict()) or len(state["counts"]) != len(self._maps):
            raise QuantizationError("The importance matrix so far belongs to another model.")
        for (name, inputs), count in zip(self._maps.items(), state["counts"].tolist(), strict=True):
            inputs.sums, inputs.count = state[f"sums.{name}"].clone(), count

    def remove(self) -> None:
        """Stops watching."""
        for module, handle in self._watched:
            handle.remove()
            del module.squared_inputs
        self._watched.clear()


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """The module that is called for every linear map but the output head, by its name without any adapter."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = getattr(module, "base", None)
        if _is_linear(module) and module is not head and not name.endswith(".base"):
            found[name] = module
        elif isinstance(inner, nn.Module) and _is_linear(inner) and inner is not head:
            found[name] = module  # an adapter around it
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantLinear) or is_conv1d(module)


def _in_features(module: nn.Module) -> int:
    if is_conv1d(module):
        return int(module.get_parameter("weight").shape[0])
    return int(module.in_features)  # type: ignore[arg-type]


def _hook(inputs: SquaredInputs) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        observe(arguments[0], [inputs])

    return watch
