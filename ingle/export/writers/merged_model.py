"""Reads a base and its adapter weight by weight.

At most one weight is in memory.  :mod:`ingle.adapters.merging` computes the merges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ingle import adapters, models
from ingle.adapters.identity import BaseIdentity, make_identity, sample, tensor_digest
from ingle.adapters.linear import AdaptedLinear, cannot_merge
from ingle.adapters.merging import is_changed, merged_planes, merged_weight
from ingle.adapters.virtual_tokens import Virtual
from ingle.errors import AdapterError
from ingle.events import Sink, Warned
from ingle.inference import Source
from ingle.models import model_task
from ingle.models.loading.weight_stream import WeightEntry, WeightStream, plain_value
from ingle.quant.conversion import is_conv1d
from ingle.quant.experts import QuantStack
from ingle.quant.format import Format
from ingle.quant.linear import QuantModule
from ingle.quant.task_heads import is_in_head


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """One parameter with its data.

    Attributes:
        name: Name of the parameter in the model.
        holder: The quantized module, or the module that owns the parameter.
        layer: The adapted layer, if its adapter changes the parameter.
        replacement: The trained value, if the adapter saves the parameter itself.
    """

    name: str
    holder: nn.Module
    layer: AdaptedLinear | None
    replacement: Tensor | None

    @property
    def format(self) -> Format | None:
        """Format of the base; None for a plain parameter."""
        is_weight = isinstance(self.holder, QuantModule) and not self.name.endswith(".bias")
        return self.holder.format if is_weight else None  # type: ignore[return-value]

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> Tensor:
        """Returns the merged value in the layout of the files (``[O, I]``; for Conv1D ``[I, O]``)."""
        if self.replacement is not None:
            return self.replacement.to(dtype)
        if self.layer is not None:
            weight = merged_weight(self.layer, dtype)
            return weight.t().contiguous() if is_transposed(self.layer.base) else weight
        return self.base(dtype)

    @torch.no_grad()
    def base(self, dtype: torch.dtype) -> Tensor:
        """Returns the value of the base in the layout of the files."""
        holder = self.holder
        if self.format is None:
            return plain_value(holder, self.name).to(dtype)
        if isinstance(holder, QuantStack):
            assert holder.num_stacked is not None
            stacked = torch.stack([holder.decode(expert, dtype) for expert in range(holder.num_stacked)])
            return stacked.transpose(-1, -2).contiguous() if holder.transposed else stacked
        assert isinstance(holder, QuantModule)
        weight = holder.format.decode(holder.planes(), holder.out_features, holder.in_features, dtype)
        return weight.t().contiguous() if holder.transposed else weight

    @torch.no_grad()
    def planes(self, target: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the merged value quantized to ``target``, or the base's own planes if :meth:`is_copied`."""
        if self.layer is not None:
            return merged_planes(self.layer, target, importance, name=self.name)
        if self.is_copied(target):
            assert isinstance(self.holder, QuantModule)
            return self.holder.planes()
        return target.encode(self.merged(torch.float32), importance, name=self.name)

    def is_copied(self, target: Format) -> bool:
        """Returns whether nothing changes the parameter and its format stays."""
        return self.layer is None and self.replacement is None and self.format == target


class MergedModel:
    """A base and its adapter.

    Args:
        source: Model to read.
        checks_base: Whether to compute the identity of the base while its weights are read, for
            :meth:`explain_mismatch`.
        sink: Receives warnings from loading the adapter.

    Attributes:
        stream: The base.
        adapted: Adapted layers by parameter.
        changed: Names in ``adapted`` whose adapter changes the parameter.
        replaced: Trained values of the modules in ``modules_to_save``, and of biases and norms, by parameter.
        added: Names in ``replaced`` that no file of the base contains: the head of a task, or an output head that was
            tied.

    Raises:
        ModelError: The model cannot be read, or cannot be read weight by weight.
        AdapterError: The adapter does not fit the base.
    """

    def __init__(self, source: Source, *, checks_base: bool = False, sink: Sink = lambda event: None) -> None:
        dtype, task = models.compute_dtype(source.model.dtype, "cpu"), model_task(source.objective())
        self.stream = WeightStream(source.model, source.base, dtype, task)
        self.adapted: dict[str, AdaptedLinear] = {}
        self.changed: dict[str, AdaptedLinear] = {}
        self.replaced: dict[str, Tensor] = {}
        self._biases: dict[str, AdaptedLinear] = {}
        self._expected: BaseIdentity | None = None
        self._found = _StreamedIdentity()
        if source.adapter is not None:
            if checks_base:
                self._expected = adapters.read_record(source.adapter).identity
            report = adapters.load_adapter(self.stream.model, source.adapter)
            _require_weights(self.stream.model, source.adapter)
            for note in report.notes:
                sink(Warned(note, where=str(source.adapter)))
            for name, module in adapters.adapted_modules(self.stream.model).items():
                if module.unmerged is not None or not isinstance(module, AdaptedLinear):
                    raise cannot_merge(module.unmerged or "it changes no weight")
                self.adapted[f"{name}.weight"] = module
                self._biases[f"{name}.bias"] = module
            self.changed = {name: layer for name, layer in self.adapted.items() if is_changed(layer)}
            for path in report.modules_to_save:
                for key, parameter in self.stream.model.get_submodule(path).named_parameters(remove_duplicate=False):
                    self.replaced[f"{path}.{key}"] = parameter.detach()
            for path in report.parameters:
                self.replaced[path] = self.stream.model.get_parameter(path).detach()
        stored = {entry.name for entry in self.stream.entries}
        self.added = tuple(name for name in self.replaced if name not in stored and not self._is_tied(name, stored))

    @contextmanager
    def loaded(self, entry: WeightEntry) -> Iterator[LoadedWeight]:
        """Loads one parameter while the block runs."""
        replacement = self.replaced.get(entry.name)
        if replacement is not None and self._expected is None:
            yield LoadedWeight(entry.name, self.stream.holder(entry.name), None, replacement)
            return
        with self.stream.loaded(entry.name) as holder:
            if self._expected is not None and not is_in_head(self.stream.model, entry.name):
                self._found.add(entry.name, holder, self.adapted.get(entry.name))
            if entry.name in self._biases:
                before = plain_value(holder, entry.name)
                after = self._biases[entry.name].merge_bias(before.float())
                replacement = None if torch.equal(before.float(), after) else after
            yield LoadedWeight(entry.name, holder, self.changed.get(entry.name), replacement)

    @property
    def untied(self) -> tuple[str, ...]:
        """Names in ``added`` of weights that were tied."""
        return tuple(name for name in self.added if not is_in_head(self.stream.model, name))

    def explain_mismatch(self) -> str | None:
        """Returns how the base differs from that of the adapter, or None; call it after all weights were loaded."""
        if self._expected is None:
            return None
        found = self._found.identity()
        return None if found.sha256 == self._expected.sha256 else self._expected.explain_difference(found)

    def _is_tied(self, name: str, stored: set[str]) -> bool:
        """Returns whether a stored parameter has the same value, so that one entry of the files serves both."""
        own = self.replaced[name]
        return any(
            other in stored and value.shape == own.shape and torch.equal(value, own)
            for other, value in self.replaced.items()
            if other != name
        )


def _require_weights(model: nn.Module, adapter: Path) -> None:
    """Refuses an adapter that adds to texts what no weight of a model can express."""
    if any(isinstance(module, Virtual) for module in model.modules()):
        raise AdapterError(
            "Virtual tokens cannot be merged into the weights of a model.",
            where=str(adapter),
            why="they come before every text, and are no part of a weight",
            fix="--to peft writes them for PEFT; --adapter.kind=lora trains what can be merged",
        )


class _StreamedIdentity:
    """Computes the identity of a base whose weights are loaded one after the other."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._formats: Counter[str] = Counter()
        self._samples: dict[str, list[float]] = {}

    def add(self, name: str, holder: nn.Module, layer: AdaptedLinear | None) -> None:
        path, _, leaf = name.rpartition(".")
        if leaf in holder._buffers and not isinstance(holder, QuantModule):
            return  # an identity covers parameters
        if isinstance(holder, QuantModule) and leaf != "bias":
            prefix = name if isinstance(holder, QuantStack) else path
            tensors = {f"{prefix}.{key}": plane for key, plane in holder.planes().items()}
            if tensors.keys() - self._digests.keys():
                self._formats[holder.format.name] += 1
        else:
            tensors = {name: plain_value(holder, name)}
        self._digests |= {key: tensor_digest(tensor) for key, tensor in tensors.items() if key not in self._digests}
        if layer is not None:
            self._samples[path] = sample(layer.base)

    def identity(self) -> BaseIdentity:
        return make_identity(self._digests, self._formats, self._samples)


def is_transposed(base: nn.Module) -> bool:
    """Returns whether files store a linear layer's weight as ``[I, O]`` (GPT-2's Conv1D)."""
    return bool(getattr(base, "transposed", False)) or is_conv1d(base)
