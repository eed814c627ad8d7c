"""A model whose weights are held in one format after another, and what each of them costs and takes.

Linear maps become the very modules that training and answering use, decoded anew for every product.  Embeddings and
the output layer, which a GGUF file packs too, hold the decoded values in their place.  What stood there before is kept
and put back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ingle.errors import EvaluationError
from ingle.quant.conversion import is_conv1d
from ingle.quant.experts import is_fused_experts
from ingle.quant.format import Format
from ingle.quant.imatrix_collector import linear_maps
from ingle.quant.linear import QuantLinear

#: Seconds that decoding is measured for, and sweeps over the model at least and at most.
_MEASURE_S, _LEAST_SWEEPS, _MOST_SWEEPS = 0.3, 3, 50

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Held:
    """A model in a format.

    Attributes:
        encode_s: Time that packing took.
        memory_bytes: All parameters, and the largest weight decoded.
        decode_weights_per_s: Of the packed linear maps one after the other; None where there are none.
    """

    encode_s: float
    memory_bytes: int
    decode_weights_per_s: float | None


class Bench:
    """Holds the weights of a model in formats.

    Args:
        model: With its weights in the compute type, in evaluation mode, without adapters.

    Attributes:
        shapes: Rows and columns of every matrix that can be packed, by its parameter's name; tied ones once.

    Raises:
        EvaluationError: The model has weights that cannot be exchanged one by one.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        experts = [name for name, module in model.named_modules() if is_fused_experts(module)]
        if experts:
            raise EvaluationError(
                "Formats of mixture-of-experts models cannot be compared yet.",
                where=experts[0],
                fix="`ingle train --base.format=...` holds their experts in any format",
            )
        self._maps = {f"{name}.weight": module for name, module in linear_maps(model).items()}
        self._tables = _tables(model)
        matrices = {name: _matrix(module) for name, module in self._maps.items()} | self._tables
        self.shapes: dict[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in matrices.items()
        }

    @contextmanager
    def holding(
        self,
        formats: Mapping[str, Format],
        importance: Mapping[str, Tensor] | None = None,
        tell: Tell = lambda done, total: None,
    ) -> Iterator[Held]:
        """The model holds every named matrix in its format while the block runs.

        Args:
            formats: By parameter; what is not named stays.
            importance: Mean squares of inputs, by parameter.
            tell: Gets the number of matrices packed so far, and their total.

        Raises:
            QuantizationError: A weight cannot be held in its format.
        """
        weights = importance or {}
        kept: dict[str, Tensor] = {}
        packed: dict[str, QuantLinear] = {}
        encode_s = 0.0
        try:
            for done, (name, format) in enumerate(formats.items(), 1):
                began = time.perf_counter()
                if name in self._maps:
                    packed[name] = _pack(self._maps[name], format, name, weights.get(name))
                    encode_s += time.perf_counter() - began
                    self._model.set_submodule(name.removesuffix(".weight"), packed[name])
                else:
                    table = self._tables[name]
                    kept[name] = table.detach().clone()
                    planes = format.encode(table.detach(), weights.get(name), name=name)
                    encode_s += time.perf_counter() - began
                    table.data.copy_(format.decode(planes, *self.shapes[name], table.dtype))
                tell(done, len(formats))
            yield Held(encode_s, self._memory_bytes(packed), _decode_rate(list(packed.values()), self._model.dtype))
        finally:
            for name in packed:
                self._model.set_submodule(name.removesuffix(".weight"), self._maps[name])
            for name, values in kept.items():
                self._tables[name].data.copy_(values)

    def _memory_bytes(self, packed: Mapping[str, QuantLinear]) -> int:
        held = sum(int(parameter.nbytes) for parameter in self._model.parameters())
        largest = max((module.out_features * module.in_features for module in packed.values()), default=0)
        dtype: torch.dtype = self._model.dtype
        return held + largest * dtype.itemsize


def _tables(model: Any) -> dict[str, nn.Parameter]:
    """Embedding and output layer, one name for both where they are tied."""
    found: dict[str, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if weight is not None and id(weight) in names:
            found[names[id(weight)]] = weight
    return found


def _matrix(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight


def _pack(module: nn.Module, format: Format, name: str, importance: Tensor | None) -> QuantLinear:
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    rows, columns = _matrix(module).shape
    layer = QuantLinear(
        format,
        columns,
        rows,
        bias=bias is not None,
        transposed=is_conv1d(module),
        weight_dtype=weight.dtype,
        device="meta",
    )
    layer.bias = bias
    layer.quantize(weight.detach(), name=name, importance=importance)
    return layer.eval()


def _decode_rate(layers: list[QuantLinear], dtype: torch.dtype) -> float | None:
    """Weights a second: the fastest sweep over all layers, since other programs only ever slow one down."""
    if not layers:
        return None

    def sweep() -> float:
        began = time.perf_counter()
        for layer in layers:
            layer.decode(dtype, layer.scratch(dtype))
        if layers[0].get_parameter(next(iter(layers[0].specs))).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    sweep()
    times = [sweep() for _ in range(_LEAST_SWEEPS)]
    while sum(times) < _MEASURE_S and len(times) < _MOST_SWEEPS:
        times.append(sweep())
    return sum(prod((layer.out_features, layer.in_features)) for layer in layers) / min(times)
