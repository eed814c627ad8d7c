"""Temporarily quantizes the weights of a model to other formats, and measures the time and memory of each.

Linear layers become the modules that training and generation use, which decode their weights for every product.
Embeddings and the output layer, which a GGUF file quantizes too, get the decoded values. The original weights are kept
and restored afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ingle.errors import EvaluationError
from ingle.evaluation.run.divergence import Predictions
from ingle.evaluation.statistics.intervals import bootstrap, wilson
from ingle.quant.conversion import is_conv1d
from ingle.quant.experts import is_experts
from ingle.quant.format import Format
from ingle.quant.imatrix_collector import linear_maps
from ingle.quant.linear import QuantLinear
from ingle.report.format_results import Figure, Quality

#: Duration of a measurement of decoding, and the limits of its sweeps over the model.
_MEASURE_S, _MIN_SWEEPS, _MAX_SWEEPS = 0.3, 3, 50

_NUM_RESAMPLES = 2_000

Floats = npt.NDArray[np.float64]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Cost:
    """Time and memory that a format takes.

    Attributes:
        encode_s: Time to quantize the model.
        memory_bytes: Size of all parameters and of the largest decoded weight.
        decode_weights_per_s: Decoding speed of the quantized linear layers; None if there are none.
    """

    encode_s: float
    memory_bytes: int
    decode_weights_per_s: float | None


class FormatTrial:
    """Temporarily quantizes the weights of a model.

    Args:
        model: A model in the compute dtype and in evaluation mode, without adapters.

    Raises:
        EvaluationError: The model has fused experts.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        experts = [name for name, module in model.named_modules() if is_experts(module)]
        if experts:
            raise EvaluationError(
                "Formats of mixture-of-experts models cannot be compared yet.",
                where=experts[0],
                fix="`ingle train --base.format=...` quantizes their experts to any format",
            )
        self._maps = {f"{name}.weight": module for name, module in linear_maps(model).items()}
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        weights = {id(module.weight) for module in ends if hasattr(module, "weight")}
        self._tables = {name: weight for name, weight in model.named_parameters() if id(weight) in weights}

    @contextmanager
    def quantized(
        self,
        formats: Mapping[str, Format],
        importance: Mapping[str, Tensor] | None = None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> Iterator[Cost]:
        """Quantizes every named matrix while the block runs.

        Args:
            formats: Format of each matrix, by parameter name.
            importance: Mean squares of inputs, by parameter name.
            on_progress: Called with the number of quantized matrices and their total.

        Raises:
            QuantizationError: A weight cannot be stored in its format.
        """
        importance = importance or {}
        kept: dict[str, Tensor] = {}
        layers: dict[str, QuantLinear] = {}
        encode_s = 0.0
        try:
            for done, (name, format) in enumerate(formats.items(), 1):
                began = time.perf_counter()
                if name in self._maps:
                    layers[name] = _quantize(self._maps[name], format, name, importance.get(name))
                    encode_s += time.perf_counter() - began
                    self._model.set_submodule(name.removesuffix(".weight"), layers[name])
                else:
                    table = self._tables[name].detach()
                    kept[name] = table.clone()
                    planes = format.encode(table, importance.get(name), name=name)
                    encode_s += time.perf_counter() - began
                    table.copy_(format.decode(planes, table.shape[0], table.shape[1], table.dtype))
                on_progress(done, len(formats))
            dtype: torch.dtype = self._model.dtype
            memory = sum(int(parameter.nbytes) for parameter in self._model.parameters())
            largest = max((layer.num_weights for layer in layers.values()), default=0)
            yield Cost(encode_s, memory + largest * dtype.itemsize, _decode_rate(list(layers.values()), dtype))
        finally:
            for name in layers:
                self._model.set_submodule(name.removesuffix(".weight"), self._maps[name])
            for name, values in kept.items():
                self._tables[name].detach().copy_(values)


def quality_of(predictions: Predictions) -> Quality:
    """Returns the statistics of a comparison with the unquantized model.

    Intervals resample windows, because tokens of one window depend on one another.
    """
    rises = predictions.nll - predictions.reference_nll
    agreed = wilson(int(predictions.agrees.sum()), len(predictions.nll))
    return Quality(
        perplexity=_mean(predictions.by_window(predictions.nll), exponential=True),
        loss=_mean(predictions.by_window(rises)),
        kl=_mean(predictions.by_window(predictions.kl)),
        kl_99=float(np.quantile(predictions.kl, 0.99)),
        top_1=Figure(float(predictions.agrees.mean()), agreed.low, agreed.high),
    )


def _quantize(module: nn.Module, format: Format, name: str, importance: Tensor | None) -> QuantLinear:
    weight, bias, transposed = module.get_parameter("weight"), module._parameters.get("bias"), is_conv1d(module)
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    layer = QuantLinear(
        format,
        in_features,
        out_features,
        bias=bias is not None,
        transposed=transposed,
        weight_dtype=weight.dtype,
        device="meta",
    )
    layer.bias = bias
    layer.quantize(weight.detach(), name=name, importance=importance)
    return layer.eval()


def _decode_rate(layers: Sequence[QuantLinear], dtype: torch.dtype) -> float | None:
    """Returns weights per second in the fastest pass over all layers; other programs can only slow a pass down."""
    if not layers:
        return None

    def sweep() -> float:
        began = time.perf_counter()
        for layer in layers:
            layer.decode(dtype, layer.scratch(dtype))
        if next(layers[0].parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    sweep()
    times = [sweep() for _ in range(_MIN_SWEEPS)]
    while sum(times) < _MEASURE_S and len(times) < _MAX_SWEEPS:
        times.append(sweep())
    return sum(layer.num_weights for layer in layers) / min(times)


def _mean(statistics_W2: Floats, *, exponential: bool = False) -> Figure:
    """Returns the mean, or its exponential, of sums and counts per window, with its interval."""

    def mean(totals: Floats) -> Floats:
        ratio = totals[..., 0] / totals[..., 1]
        return np.asarray(np.exp(np.minimum(ratio, 100.0))) if exponential else ratio

    value = float(mean(statistics_W2.sum(0)[None])[0])
    if len(statistics_W2) < 2:
        return Figure(value, None, None)
    interval = bootstrap(
        lambda times_RW: mean(times_RW @ statistics_W2), len(statistics_W2), num_resamples=_NUM_RESAMPLES
    )
    return Figure(value, interval.low, interval.high)
