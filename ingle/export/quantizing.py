"""Packs a model as it is, without an adapter: one file or folder, and what each class of weights lost in it.

The losses are those of the result: every packed weight is read back from what was written and compared with where it
came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle import models
from ingle.config.base import NoBase
from ingle.config.model import ModelConfig
from ingle.config.named import check_name
from ingle.errors import ConfigError
from ingle.evaluation.format_survey import Target, find_target, read_windows
from ingle.evaluation.run.importance_matrix import gather_importance
from ingle.events import Progress, Saved, Sink
from ingle.export import hf
from ingle.export.gguf import GgufExport
from ingle.export.merging import Merger
from ingle.export.place import Place
from ingle.export.request import require_file
from ingle.gguf import read_gguf
from ingle.inference import Source
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.hub import locate
from ingle.quant.format import PLAIN

#: Tokens of a text that an importance matrix is gathered from.
NUM_TOKENS = 65_536

#: Rows compared at once.
_ROWS = 1024

#: The last word of a weight's name, without its ending: what it does, in whatever layer.
_CLASS = re.compile(r"([^.]+)\.weight$")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be packed.

    Attributes:
        model: A folder or hub id.
        to: Name of the target.
        out: A ``.gguf`` file, or a new folder.
        imatrix: An importance matrix; with ``data`` it is gathered and written there, else read.
        data: Text to gather an importance matrix from.
        num_tokens: How much of it.
    """

    model: str
    to: str
    out: Path
    imatrix: Path | None = None
    data: Path | None = None
    num_tokens: int = NUM_TOKENS

    def check(self) -> Target:
        """The target.

        Raises:
            ConfigError: The format is unknown, or options contradict one another.
        """
        target = find_target(self.to)
        weighed = target.name not in PLAIN if target.base is None else target.base.format == "hqq"
        for option, given in (("--imatrix", self.imatrix), ("--data", self.data)):
            if given is not None and not weighed:
                raise ConfigError(
                    f"{target.name} does not use an importance matrix.",
                    where=f"{option} {given}",
                    fix=f"leave {option} out, or choose a GGUF type with blocks (q4_k_m) or hqq",
                )
        if self.data is not None and self.imatrix is not None and self.imatrix.exists():
            raise ConfigError(
                f"{self.imatrix} exists; nothing is overwritten.",
                where=f"--imatrix {self.imatrix}",
                why="with --data, the importance matrix is gathered and written there",
                fix="leave --data out to use the file, or name another one",
            )
        if self.data is None and self.imatrix is not None:
            require_file(self.imatrix, "--imatrix")
        return target


@dataclass
class Loss:
    """What the weights of one class lost.

    Attributes:
        types: Weights by the type they got.
        num_weights: How many there are.
        num_bytes: What they take.
        error: Sum of squared errors.
        energy: Sum of squares.
    """

    types: dict[str, int] = field(default_factory=dict)
    num_weights: int = 0
    num_bytes: int = 0
    error: float = 0.0
    energy: float = 0.0

    def add(self, weight: Tensor, packed: Tensor, type_name: str, num_bytes: int) -> None:
        """Counts one weight, before and after."""
        self.types[type_name] = self.types.get(type_name, 0) + weight.numel()
        self.num_weights += weight.numel()
        self.num_bytes += num_bytes
        for before, after in zip(weight.split(_ROWS), packed.split(_ROWS), strict=True):
            self.error += float((after.double() - before.double()).square().sum())
            self.energy += float(before.double().square().sum())

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with bits a weight and the relative root mean square error."""
        relative = (self.error / self.energy) ** 0.5 if self.energy else 0.0
        bits = 8 * self.num_bytes / self.num_weights
        kept = {key: value for key, value in asdict(self).items() if key not in ("error", "energy")}
        return kept | {"bits_per_weight": bits, "relative_error": relative}


def quantize(order: Order, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Packs a model.

    Args:
        order: What into what.
        sink: Gets the progress.

    Returns:
        ``path, to, container, num_weights, num_bytes_before, num_bytes, bits_per_weight, imatrix`` and ``classes``: for
        each class of weights its types, size, bits a weight and relative error.

    Raises:
        ConfigError: The format is unknown, options contradict one another, or something would be overwritten.
        IngleError: For every other mistake of the user.
    """
    target = order.check()
    check_name(order.model)
    is_file = target.container == "gguf"
    name = Path(order.model).resolve().name
    place = Place(order.out, f"{name}-{target.name}" if is_file else None, companions=())
    source = Source(ModelConfig(id=order.model, dtype="float32"), NoBase())
    tokenizer = models.load_tokenizer(source.model)
    merger = Merger(source, sink=sink)
    _require_plain(merger, order.model)
    importance = _importance(order, merger, tokenizer, sink)
    with place.opened() as partial:
        if is_file:
            assert place.main is not None
            classes = _write_gguf(merger, tokenizer, target, importance, partial / place.main, name, place, sink)
        else:
            classes = _write_folder(merger, tokenizer, source.model, target, importance, partial, place, sink)
    num_weights = sum(loss.num_weights for loss in classes.values())
    num_bytes = sum(loss.num_bytes for loss in classes.values())
    sink(Saved(0, str(place.result), "model"))
    return {
        "path": str(place.result),
        "to": target.name,
        "container": target.container,
        "num_weights": num_weights,
        "num_bytes_before": _bytes_on_disk(source.model),
        "num_bytes": num_bytes,
        "bits_per_weight": 8 * num_bytes / num_weights,
        "imatrix": None if importance is None else str(order.imatrix or order.data),
        "classes": {key: loss.to_dict() for key, loss in classes.items()},
    }


def _require_plain(merger: Merger, name: str) -> None:
    formats = (getattr(merger.stream.holder(entry.name), "format", None) for entry in merger.stream.entries)
    packed = next((format for format in formats if format is not None), None)
    if packed is not None:
        raise ConfigError(
            f"The weights of {name} are already packed in {packed.name}.",
            where="MODEL",
            why="packing them again would lose more, and the loss against the original could not be measured",
            fix="name the model's 16-bit release; `ingle export` copies packed weights as they are",
        )


def _bytes_on_disk(model: ModelConfig) -> int:
    folder = locate(model.id, revision=model.revision, part="weights")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _importance(order: Order, merger: Merger, tokenizer: Any, sink: Sink) -> dict[str, Tensor] | None:
    """By parameter."""
    if order.data is None:
        return None if order.imatrix is None else models.load_importance(merger.stream.model, order.imatrix, sink)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load_model(ModelConfig(id=order.model), device=device, sink=sink)
    windows = read_windows(str(order.data), model, tokenizer, order.num_tokens)
    entries = gather_importance(model, windows, lambda done, total: sink(Progress("reading the text", done, total)))
    if order.imatrix is not None:
        order.imatrix.parent.mkdir(parents=True, exist_ok=True)
        longest = max(len(window.sample.input_ids) for window in windows)
        models.save_importance(model, entries, order.imatrix, datasets=[str(order.data)], chunk_size=longest)
        sink(Saved(0, str(order.imatrix), "imatrix"))
    return {name: entry.mean for name, entry in entries.items()}


def _write_gguf(
    merger: Merger,
    tokenizer: Any,
    target: Target,
    importance: Mapping[str, Tensor] | None,
    path: Path,
    name: str,
    place: Place,
    sink: Sink,
) -> dict[str, Loss]:
    names = models.gguf_names(merger.stream.model)
    named = {str(names.to_gguf(name)): values for name, values in (importance or {}).items()}
    export = GgufExport(merger, tokenizer, target.name, named)
    place.require_bytes(export.num_bytes)
    export.write(path, {"general.name": name}, sink=sink)
    tensors = read_gguf(path).tensors
    losses = _Losses(sink, len(export.planned))
    for planned in export.planned:
        assert planned.entry is not None
        tensor, names = tensors[planned.name], export.names
        order, offset = names.permutation(planned.name, planned.shape[0]), names.offset(planned.name)
        written = GgufWeight(planned.hf_name, tensor, order, offset).value(torch.float32).float()
        with merger.loaded(planned.entry) as loaded:
            losses.add(planned.name, loaded.merged(torch.float32), written, planned.type, tensor.num_bytes)
    return losses.classes


def _write_folder(
    merger: Merger,
    tokenizer: Any,
    model: ModelConfig,
    target: Target,
    importance: Mapping[str, Tensor] | None,
    folder: Path,
    place: Place,
    sink: Sink,
) -> dict[str, Loss]:
    assert target.base is not None
    layout = hf.Layout(torch.bfloat16, target.base)
    place.require_bytes(hf.estimate_bytes(merger, layout))
    hf.write_safetensors(merger, tokenizer, model, folder, layout, importance=importance, sink=sink)
    written = Merger(Source(ModelConfig(id=str(folder), dtype="bfloat16"), target.base))
    losses = _Losses(sink, len(merger.stream.entries))
    for entry, other in _pairs(merger, written):
        with merger.loaded(entry) as loaded, written.loaded(other) as packed:
            format = packed.format
            value = packed.base(torch.float32)
            num_bytes = 2 * value.numel()
            if format is not None:
                num_bytes = sum(plane.nbytes for plane in packed.holder.planes().values())  # type: ignore[operator]
            losses.add(
                entry.name, loaded.merged(torch.float32), value, "bf16" if format is None else target.name, num_bytes
            )
    return losses.classes


def _pairs(merger: Merger, written: Merger) -> Iterator[tuple[Any, Any]]:
    there = {entry.name: entry for entry in written.stream.entries}
    return ((entry, there[entry.name]) for entry in merger.stream.entries)


class _Losses:
    """Losses by class, in the order in which classes come."""

    def __init__(self, sink: Sink, total: int) -> None:
        self.classes: dict[str, Loss] = {}
        self._tell: Callable[[int], None] = lambda done: sink(Progress("reading back", done, total))
        self._done = 0

    def add(self, name: str, weight: Tensor, packed: Tensor, type_name: str, num_bytes: int) -> None:
        """Counts one weight under its class: its name without layer and ending."""
        match = _CLASS.search(name)
        key = match[1] if match is not None and weight.dim() > 1 else "norms and biases"
        self.classes.setdefault(key, Loss()).add(weight, packed, type_name, num_bytes)
        self._done += 1
        self._tell(self._done)
