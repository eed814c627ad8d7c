"""Quantizes a model without an adapter and reports the loss of each class of weights.

The losses are those of the result: every quantized weight is read back from the written files and compared with the
original.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle import models
from ingle.config.base import NoBase
from ingle.config.model import ModelConfig
from ingle.config.model_names import check_name
from ingle.errors import ConfigError
from ingle.evaluation.format_survey import Target, find_target, read_windows
from ingle.evaluation.run.importance_matrix import gather_importance
from ingle.events import Progress, Saved, Sink
from ingle.export.output_paths import OutputPaths
from ingle.export.request import require_file
from ingle.export.writers.gguf_file import GgufExport
from ingle.export.writers.merged_model import MergedModel
from ingle.export.writers.safetensors_folder import Layout, estimate_bytes, write_safetensors
from ingle.gguf import read_gguf
from ingle.inference import Source
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.hub import locate
from ingle.quant.format import PLAIN

#: Number of tokens of a text from which an importance matrix is gathered.
NUM_TOKENS = 65_536

#: Number of rows compared at once.
_ROWS = 1024

#: Matches the last part of a weight's name before ``.weight``, which is its role in a layer.
_CLASS = re.compile(r"([^.]+)\.weight$")


@dataclass
class ClassLoss:
    """Loss of the weights of one class.

    Attributes:
        types: Number of weights by type.
        num_weights: Number of weights.
        num_bytes: Size of the weights.
        error: Sum of squared errors.
        energy: Sum of squares of the original weights.
    """

    types: dict[str, int] = field(default_factory=dict)
    num_weights: int = 0
    num_bytes: int = 0
    error: float = 0.0
    energy: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Mean size of a weight in bits."""
        return 8 * self.num_bytes / self.num_weights

    @property
    def relative_error(self) -> float:
        """RMS of the error over RMS of the weights."""
        return (self.error / self.energy) ** 0.5 if self.energy else 0.0

    def add(self, original: Tensor, quantized: Tensor, type_name: str, num_bytes: int) -> None:
        """Adds one tensor."""
        self.types[type_name] = self.types.get(type_name, 0) + original.numel()
        self.num_weights += original.numel()
        self.num_bytes += num_bytes
        for before, after in zip(original.split(_ROWS), quantized.split(_ROWS), strict=True):
            self.error += float((after.double() - before.double()).square().sum())
            self.energy += float(before.double().square().sum())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        keys = ("types", "num_weights", "num_bytes", "bits_per_weight", "relative_error")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized model.

    Attributes:
        path: The GGUF file, or the folder.
        to: Name of the format.
        container: ``gguf`` or ``safetensors``.
        num_bytes_before: Size of the original files.
        imatrix: Source of the importance matrix; None if there was none.
        classes: Loss by class of weights.
    """

    path: Path
    to: str
    container: str
    num_bytes_before: int
    imatrix: str | None
    classes: dict[str, ClassLoss]

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return sum(loss.num_weights for loss in self.classes.values())

    @property
    def num_bytes(self) -> int:
        """Size of the quantized weights."""
        return sum(loss.num_bytes for loss in self.classes.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean size of a weight in bits."""
        return 8 * self.num_bytes / self.num_weights

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, as ``ingle quantize --json`` prints it."""
        return {
            "path": str(self.path),
            "to": self.to,
            "container": self.container,
            "num_weights": self.num_weights,
            "num_bytes_before": self.num_bytes_before,
            "num_bytes": self.num_bytes,
            "bits_per_weight": self.bits_per_weight,
            "imatrix": self.imatrix,
            "classes": {key: loss.to_dict() for key, loss in self.classes.items()},
        }


def quantize(
    model: str,
    to: str,
    out: Path | str,
    *,
    imatrix: Path | None = None,
    data: Path | None = None,
    num_tokens: int = NUM_TOKENS,
    sink: Sink = lambda event: None,
) -> QuantizationResult:
    """Quantizes a model.

    Args:
        model: Folder or hub id of a model in 16 or 32 bits.
        to: Name of the format.
        out: A ``.gguf`` file, or a new folder.
        imatrix: Importance matrix.  It is read, or with ``data`` gathered and written.
        data: Text from which an importance matrix is gathered.
        num_tokens: Number of tokens of ``data`` to read.
        sink: Receives progress events.

    Raises:
        ConfigError: The format is unknown, options contradict each other, or a file would be overwritten.
        IngleError: Any other mistake of the user.
    """
    target = find_target(to)
    _check_importance(target, imatrix, data)
    check_name(model)
    is_gguf = target.container == "gguf"
    name = Path(model).resolve().name
    paths = OutputPaths(Path(out), f"{name}-{target.name}" if is_gguf else None, companions=())
    source = Source(ModelConfig(id=model, dtype="float32"), NoBase())
    tokenizer = models.load_tokenizer(source.model)
    original = MergedModel(source, sink=sink)
    _require_plain(original, model)
    importance = None
    if data is not None:
        importance = _gather(model, data, num_tokens, imatrix, tokenizer, sink)
    elif imatrix is not None:
        importance = models.load_importance(original.stream.model, imatrix, sink)
    with paths.opened() as partial:
        if is_gguf:
            assert paths.main is not None
            columns = models.importance_by_tensor(original.stream.model, importance or {})
            export = GgufExport(original, tokenizer, target.name, columns)
            paths.require_bytes(export.num_bytes)
            export.write(partial / paths.main, {"general.name": name}, sink=sink)
            losses = _compare_gguf(export, partial / paths.main)
        else:
            assert target.base is not None
            layout = Layout(torch.bfloat16, target.base)
            paths.require_bytes(estimate_bytes(original, layout))
            write_safetensors(original, tokenizer, source.model, partial, layout, importance=importance, sink=sink)
            losses = _compare_folder(original, partial, target)
        classes = _classify(losses, len(original.stream.entries), sink)
    sink(Saved(0, str(paths.result), "model"))
    return QuantizationResult(
        path=paths.result,
        to=target.name,
        container=target.container,
        num_bytes_before=_bytes_on_disk(source.model),
        imatrix=None if importance is None else str(imatrix or data),
        classes=classes,
    )


def _check_importance(target: Target, imatrix: Path | None, data: Path | None) -> None:
    weighted = target.name not in PLAIN if target.base is None else target.base.format == "hqq"
    for option, given in (("--imatrix", imatrix), ("--data", data)):
        if given is not None and not weighted:
            raise ConfigError(
                f"{target.name} does not use an importance matrix.",
                where=f"{option} {given}",
                fix=f"remove {option}, or choose a GGUF type with blocks (q4_k_m) or hqq",
            )
    if data is not None and imatrix is not None and imatrix.exists():
        raise ConfigError(
            f"{imatrix} already exists; nothing is overwritten.",
            where=f"--imatrix {imatrix}",
            why="with --data, the importance matrix is gathered and written there",
            fix="remove --data to use the file, or name another file",
        )
    if data is None and imatrix is not None:
        require_file(imatrix, "--imatrix")


def _require_plain(original: MergedModel, name: str) -> None:
    formats = (getattr(original.stream.holder(entry.name), "format", None) for entry in original.stream.entries)
    format = next((format for format in formats if format is not None), None)
    if format is not None:
        raise ConfigError(
            f"The weights of {name} are already quantized to {format.name}.",
            where="MODEL",
            why="quantizing them again would lose more, and the loss against the original could not be measured",
            fix="name the model's 16-bit release; `ingle export` copies quantized weights unchanged",
        )


def _bytes_on_disk(model: ModelConfig) -> int:
    folder = locate(model.id, revision=model.revision, part="weights")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _gather(
    model_id: str, data: Path, num_tokens: int, imatrix: Path | None, tokenizer: Any, sink: Sink
) -> dict[str, Tensor]:
    """Gathers the importance of columns by parameter, and writes it if ``imatrix`` is given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load_model(ModelConfig(id=model_id), device=device, sink=sink)
    windows = read_windows(str(data), model, tokenizer, num_tokens)
    entries = gather_importance(model, windows, lambda done, total: sink(Progress("Reading the text", done, total)))
    if imatrix is not None:
        imatrix.parent.mkdir(parents=True, exist_ok=True)
        longest = max(len(window.sample.input_ids) for window in windows)
        models.save_importance(model, entries, imatrix, datasets=[str(data)], chunk_size=longest)
        sink(Saved(0, str(imatrix), "imatrix"))
    return {name: entry.mean for name, entry in entries.items()}


#: Name of a weight, original and quantized value, type, and size in bytes.
_Loss = tuple[str, Tensor, Tensor, str, int]


def _compare_gguf(export: GgufExport, path: Path) -> Iterable[_Loss]:
    """Reads every tensor of the written GGUF file and yields it with its original."""
    stored = read_gguf(path).tensors
    for planned in export.planned:
        assert planned.entry is not None
        if planned.part:
            continue  # the first part yields the whole parameter
        tensors = tuple(stored[name] for name in planned.rule.tensors)
        value = GgufWeight(planned.rule, tensors).value(torch.float32).float()
        with export.merged.loaded(planned.entry) as loaded:
            size = sum(tensor.num_bytes for tensor in tensors)
            yield planned.name, loaded.merged(torch.float32), value, planned.type, size


def _compare_folder(original: MergedModel, folder: Path, target: Target) -> Iterable[_Loss]:
    """Reads every parameter of the written folder and yields it with its original."""
    assert target.base is not None
    written = MergedModel(Source(ModelConfig(id=str(folder), dtype="bfloat16"), target.base))
    entries = {entry.name: entry for entry in written.stream.entries}
    for entry in original.stream.entries:
        with original.loaded(entry) as loaded, written.loaded(entries[entry.name]) as quantized:
            value = quantized.base(torch.float32)
            type_name, num_bytes = "bf16", 2 * value.numel()
            if quantized.format is not None:
                planes: Mapping[str, Tensor] = quantized.holder.planes()  # type: ignore[operator]
                type_name, num_bytes = target.name, sum(plane.nbytes for plane in planes.values())
            yield entry.name, loaded.merged(torch.float32), value, type_name, num_bytes


def _classify(losses: Iterable[_Loss], total: int, sink: Sink) -> dict[str, ClassLoss]:
    """Adds up losses by class: the name of a weight without its layer."""
    classes: dict[str, ClassLoss] = {}
    for done, (name, original, quantized, type_name, num_bytes) in enumerate(losses, 1):
        match = _CLASS.search(name)
        key = match[1] if match is not None and original.dim() > 1 else "norms and biases"
        classes.setdefault(key, ClassLoss()).add(original, quantized, type_name, num_bytes)
        sink(Progress("Reading back", done, total))
    return classes
