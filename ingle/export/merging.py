"""The model that an export writes, one weight at a time: the base as training held it, and what the adapter adds.

Nothing here holds more than one weight; the arithmetic of a merge is :mod:`ingle.adapters.merging`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ingle import adapters, models
from ingle.adapters.identity import BaseIdentity, combine, sample, tensor_digest
from ingle.adapters.lora import LoraLinear
from ingle.adapters.merging import is_touched, merged_planes, merged_weight
from ingle.events import Sink, Warned
from ingle.inference import Source
from ingle.models.loading.streaming import Entry, Stream, plain_value
from ingle.quant.conversion import is_conv1d
from ingle.quant.experts import QuantStack
from ingle.quant.format import Format
from ingle.quant.linear import QuantModule


@dataclass(frozen=True, slots=True)
class Loaded:
    """One parameter with its bytes.

    Attributes:
        name: The parameter's in the model.
        holder: The packed module, or the module that owns the parameter.
        layer: The adapter on it, if one changes it.
        trained: Its value where it was trained whole.
    """

    name: str
    holder: nn.Module
    layer: LoraLinear | None
    trained: Tensor | None

    @property
    def format(self) -> Format | None:
        """What the base is packed in."""
        return self.holder.format if isinstance(self.holder, QuantModule) and self._is_weight else None

    @property
    def _is_weight(self) -> bool:
        return not self.name.endswith(".bias")

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> Tensor:
        """The value with its change, in the layout of the files (``[O, I]``; Conv1D's ``[I, O]``)."""
        if self.trained is not None:
            return self.trained.to(dtype)
        if self.layer is not None:
            weight = merged_weight(self.layer, dtype)
            return weight.t().contiguous() if is_transposed(self.layer.base) else weight
        return self.base(dtype)

    @torch.no_grad()
    def base(self, dtype: torch.dtype) -> Tensor:
        """The value without a change, in the layout of the files."""
        holder = self.holder
        if self.format is None:
            return plain_value(holder, self.name).to(dtype)
        if isinstance(holder, QuantStack):
            assert holder.num_stacked is not None
            parts = [holder.decode(expert, dtype) for expert in range(holder.num_stacked)]
            stacked = torch.stack(parts)
            return stacked.transpose(-1, -2).contiguous() if holder.transposed else stacked
        assert isinstance(holder, QuantModule)
        weight = holder.format.decode(holder.planes(), holder.out_features, holder.in_features, dtype)
        return weight.t().contiguous() if holder.transposed else weight

    @torch.no_grad()
    def planes(self, target: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
        """The merged value packed; the base's own bytes where nothing changes it and the format stays."""
        if self.layer is not None:
            return merged_planes(self.layer, target, importance, name=self.name)
        if self.is_copied(target):
            assert isinstance(self.holder, QuantModule)
            return self.holder.planes()
        return target.encode(self.merged(torch.float32), importance, name=self.name)

    def is_copied(self, target: Format) -> bool:
        """Whether :meth:`planes` hands out the base's bytes."""
        return self.layer is None and self.trained is None and self.format == target


class Merger:
    """A base and its adapter, ready to be read weight by weight.

    Args:
        source: What to export.
        checks_base: Take note of the base's bytes as they pass, for :meth:`explain_mismatch`.
        sink: Gets the notes from loading the adapter.

    Attributes:
        stream: The base.
        all_layers: Adapters, by the parameter they sit on.
        layers: Adapters that change something, by the parameter they change.
        trained: Parameters trained whole, by name.
        identity: Of the base the adapter was trained on, where it knows it.
        untied: Parameters trained whole that no file of the base holds (an output head that was tied).

    Raises:
        ModelError: When the model cannot be read or taken apart.
        AdapterError: When the adapter does not fit.
    """

    def __init__(self, source: Source, *, checks_base: bool = False, sink: Sink | None = None) -> None:
        dtype = models.compute_dtype(source.model.dtype, "cpu")
        self.stream = Stream(source.model, source.base, dtype)
        self.layers: dict[str, LoraLinear] = {}
        self.all_layers: dict[str, LoraLinear] = {}
        self.trained: dict[str, Tensor] = {}
        self.identity: BaseIdentity | None = None
        self._passed: _Passed | None = None
        if source.adapter is not None:
            self.identity = adapters.read_record(source.adapter).identity
            self._passed = _Passed() if checks_base and self.identity is not None else None
            report = adapters.load_adapter(self.stream.model, source.adapter)
            for note in report.notes:
                if sink is not None:
                    sink(Warned(note, where=str(source.adapter)))
            modules = adapters.lora_modules(self.stream.model)
            self.all_layers = {f"{name}.weight": layer for name, layer in modules.items()}
            self.layers = {name: layer for name, layer in self.all_layers.items() if is_touched(layer)}
            for path in report.modules_to_save:
                for key, parameter in self.stream.model.get_submodule(path).named_parameters(remove_duplicate=False):
                    self.trained[f"{path}.{key}"] = parameter.detach()
        there = {entry.name for entry in self.stream.entries}
        self.untied = tuple(name for name in self.trained if name not in there and not self._is_tied(name))

    @contextmanager
    def loaded(self, entry: Entry) -> Iterator[Loaded]:
        """One parameter with its bytes while the block runs."""
        trained = self.trained.get(entry.name)
        if trained is not None and self._passed is None:
            yield Loaded(entry.name, self.stream.holder(entry.name), None, trained)
            return
        with self.stream.loaded(entry.name) as holder:
            if self._passed is not None:
                self._passed.note(entry.name, holder, self.all_layers.get(entry.name))
            yield Loaded(entry.name, holder, self.layers.get(entry.name), trained)

    def explain_mismatch(self) -> str | None:
        """How far the base that has passed is from the one the adapter was trained on; None where they are one."""
        if self._passed is None or self.identity is None:
            return None
        found = self._passed.identity()
        return None if found.sha256 == self.identity.sha256 else self.identity.explain_difference(found)

    def _is_tied(self, name: str) -> bool:
        """Whether a value trained whole is the same as another's, so that one file entry serves both."""
        own = self.trained[name]
        there = {entry.name for entry in self.stream.entries}
        return any(
            other in there and value.shape == own.shape and torch.equal(value, own)
            for other, value in self.trained.items()
            if other != name
        )


class _Passed:
    """The identity of a base whose weights come one after the other."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._formats: Counter[str] = Counter()
        self._samples: dict[str, list[float]] = {}

    def note(self, name: str, holder: nn.Module, layer: LoraLinear | None) -> None:
        path, _, leaf = name.rpartition(".")
        if isinstance(holder, QuantModule) and leaf != "bias":
            prefix = name if isinstance(holder, QuantStack) else path
            tensors = {f"{prefix}.{key}": plane for key, plane in holder.planes().items()}
            if tensors.keys() - self._digests.keys():
                self._formats[holder.format.name] += 1
        else:
            tensors = {name: plain_value(holder, name)}
        self._digests |= {key: tensor_digest(tensor) for key, tensor in tensors.items() if key not in self._digests}
        if layer is not None:
            self._samples[path] = sample(layer)

    def identity(self) -> BaseIdentity:
        return BaseIdentity(
            sha256=combine(self._digests),
            formats=dict(sorted(self._formats.items())),
            tensors={name: digest[:12] for name, digest in sorted(self._digests.items())},
            samples=dict(sorted(self._samples.items())),
        )


def is_transposed(base: nn.Module) -> bool:
    """Whether the files hold a linear map's weight as ``[I, O]`` (GPT-2's Conv1D)."""
    return bool(getattr(base, "transposed", False)) or is_conv1d(base)
