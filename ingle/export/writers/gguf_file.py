"""Writes the merged, or unchanged, model as a GGUF file with its metadata and tokenizer.

A tensor that no adapter changes and whose type stays is copied byte for byte.  Everything else is quantized from the
merged weight.  Rows are reordered for llama.cpp after quantization, which is exact because a block never crosses a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType
from numpy.typing import NDArray

from ingle import models
from ingle.config.base import why_not_quantized
from ingle.errors import ConfigError, GgufError
from ingle.events import Progress, Sink
from ingle.export.fidelity.measurement import TensorFidelity, measure
from ingle.export.writers.gguf_types import AS_TRAINED, target_of
from ingle.export.writers.merged_model import LoadedWeight, MergedModel
from ingle.gguf import GgufFile, TensorToWrite, vocabulary, write_gguf
from ingle.gguf import architecture as shapes
from ingle.gguf.container import row_bytes
from ingle.gguf.mixes import file_type_number, is_quantized, mix_of
from ingle.gguf.names import TensorRule, names_of_model
from ingle.gguf.rotary import rope_tensors
from ingle.models.loading.slots import leaf_of
from ingle.models.loading.weight_stream import WeightEntry
from ingle.quant.format import PLAIN, Format


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file.

    Attributes:
        name: Name in the GGUF file.
        entry: Stored parameter; None for a weight that was tied in the base and then trained separately.
        rule: How tensors of the file form the parameter.
        part: Which of them this one is.
        shape: Outermost size first.
        type: Lower-case name of the ggml type.
    """

    name: str
    entry: WeightEntry | None
    rule: TensorRule
    part: int
    shape: tuple[int, ...]
    type: str

    @property
    def hf_name(self) -> str:
        """Name of the parameter in the model."""
        return self.rule.target

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


@dataclass
class GgufExport:
    """A GGUF file to be written.

    Args:
        merged: Base and adapter.
        tokenizer: Tokenizer of the model.
        type: ``--type``; :data:`AS_TRAINED` keeps the format of each tensor.
        importance: Importance ``[columns]`` by GGUF name, in the order of the file.
        base_file: GGUF file of the base; unchanged tensors are copied from it.

    Attributes:
        planned: Tensors in the order of the file.
        num_copied: Number of tensors whose bytes were copied from the base.

    Raises:
        GgufError: llama.cpp does not support the architecture, the tokenizer or a weight.
        ConfigError: There is no such type, or Ingle cannot quantize to it.
    """

    merged: MergedModel
    tokenizer: Any
    type: str
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base_file: GgufFile | None = None
    num_copied: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.names = names_of_model(self.merged.stream.model)
        self._config = self.names.config
        self._described = shapes.to_metadata(self._config)
        self._base_tensors = {} if self.base_file is None else self.base_file.tensors
        self.planned = self._plan()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(planned.num_bytes for planned in self.planned)

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is quantized."""
        return any(planned.type not in PLAIN for planned in self.planned)

    def promote(self, types: Mapping[str, str]) -> None:
        """Changes the types of tensors, by GGUF name."""
        self.planned = [replace(planned, type=types.get(planned.name, planned.type)) for planned in self.planned]

    def write(
        self, path: Path, metadata: Mapping[str, Any], *, sink: Sink = lambda event: None
    ) -> list[TensorFidelity]:
        """Writes the file.

        Args:
            path: Output file.
            metadata: Further metadata (``general.name`` and so on).
            sink: Receives progress events.

        Returns:
            The fidelity of every merged weight.
        """
        found: list[TensorFidelity] = []
        total = len(self.planned)

        def reader(number: int, planned: PlannedTensor) -> Callable[[], NDArray[Any]]:
            def read() -> NDArray[Any]:
                data = self._data(planned, found)
                if number % 16 == 0 or number == total:
                    sink(Progress("Writing weights", number, total))
                return data

            return read

        tensors = [TensorToWrite(p.name, p.type, p.shape, reader(i, p)) for i, p in enumerate(self.planned, 1)]
        for name, divisors in rope_tensors(self._config).items():
            own = self._base_tensors.get(name)
            read = own.read if own is not None else partial(np.array, divisors)
            tensors.append(TensorToWrite(name, "f32" if own is None else own.type_name, divisors.shape, read))
        write_gguf(path, self.metadata() | dict(metadata), tensors)
        return found

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata for architecture, tokenizer and file type."""
        tokenizer = self.tokenizer
        model, first = self.merged.stream.model, tokenizer.eos_token_id
        is_encoder = models.kind_of(model.config) == "encoder"
        ends = () if is_encoder else models.end_token_ids(model, tokenizer)
        special = ("bos", "eos", "unk", "pad", *(("cls", "sep", "mask") if is_encoder else ()))
        words = vocabulary.to_metadata(
            json.loads(tokenizer.backend_tokenizer.to_str()),
            vocab_size=self._config["vocab_size"],
            special={f"{key}_token": getattr(tokenizer, f"{key}_token") for key in special},
            end_token_ids=sorted(ends, key=lambda number: (number != first, number)),
            chat_template=tokenizer.chat_template or None,
        )
        kind = int(LlamaFileType.GUESSED)
        if self.type != AS_TRAINED:
            kind = file_type_number(self.type)
        elif self.base_file is not None:
            kind = int(self.base_file.metadata.get("general.file_type", kind))
        general = {"general.type": "model", "general.file_type": kind}
        if self.is_quantized:
            general["general.quantization_version"] = GGML_QUANT_VERSION
        return self._described | general | words

    def measure_as(self, planned: PlannedTensor, type_name: str) -> TensorFidelity:
        """Measures how much of a merged weight's change would survive in another type."""
        assert planned.entry is not None
        with self.merged.loaded(planned.entry) as loaded:
            return measure(loaded, planned.name, target_of(type_name), self._own_importance(planned))[1]

    def _plan(self) -> list[PlannedTensor]:
        stream = self.merged.stream
        entries: list[tuple[TensorRule, WeightEntry | None]] = []
        for stored in stream.entries:
            if self.names.is_left_out(stored.name):
                continue
            entries.append((self._rule(stored.name, stream.shape(stored.name)), stored))
        for name in self.merged.added:
            entries.append((self._rule(name, tuple(self.merged.replaced[name].shape)), None))
        mix = None
        if self.type != AS_TRAINED:
            tied = not any("output.weight" in rule.tensors for rule, _ in entries)
            mix = mix_of(self.type, self._described, tied=tied, has_imatrix=bool(self.importance))
        planned = []
        for rule, entry in entries:
            for part, (name, shape) in enumerate(zip(rule.tensors, rule.file_shapes, strict=True)):
                kind = self._own_type(rule.target, name, shape) if mix is None else mix.tensor_type(name, shape)
                planned.append(PlannedTensor(name, entry, rule, part, shape, kind))
        self._require_quantizable(planned)
        return planned

    def _require_quantizable(self, planned: list[PlannedTensor]) -> None:
        """Refuses to merge into formats that Ingle only reads, before anything is measured or written."""
        merged = [each for each in planned if each.hf_name in self.merged.changed and each.type not in PLAIN]
        for kind, name in {each.type: each.name for each in merged}.items():
            reason = why_not_quantized(kind)
            if reason is not None:
                raise ConfigError(
                    f"A merged weight cannot be quantized to {kind}, which Ingle only reads.",
                    where=name,
                    why=reason,
                    fix="--type q8_0 or another type of llama.cpp; --to gguf-adapter leaves the base unchanged",
                )

    def _rule(self, name: str, shape: tuple[int, ...]) -> TensorRule:
        found = self.names.rule(name, shape, self._base_tensors or None)
        if found is None:
            raise GgufError(
                f"llama.cpp has no tensor for {name} in a model of architecture {self.names.architecture}.",
                where=name,
                fix="--to safetensors",
            )
        return found

    def _own_type(self, name: str, gguf_name: str, shape: tuple[int, ...]) -> str:
        """Returns the type of a tensor in the base's file or in training; vectors are float32."""
        if gguf_name in self._base_tensors:
            return self._base_tensors[gguf_name].type_name
        if not is_quantized(gguf_name, shape):
            return "f32"
        holder = self.merged.stream.holder(name)
        format: Any = None if name.endswith("bias") else getattr(holder, "format", None)
        if format is not None:
            return str(format.name)
        replaced = self.merged.replaced.get(name)
        dtype = holder.get_parameter(leaf_of(name)).dtype if replaced is None else replaced.dtype
        return next(kind for kind, plain in PLAIN.items() if plain == dtype)

    def _data(self, planned: PlannedTensor, found: list[TensorFidelity]) -> NDArray[Any]:
        """Returns the tensor's bytes with rows in llama.cpp's order."""
        target = target_of(planned.type)
        if planned.entry is None:
            return self._encode(planned, self.merged.replaced[planned.hf_name], target)
        with self.merged.loaded(planned.entry) as loaded:
            stored = self._base_tensors.get(planned.name)
            unchanged = loaded.layer is None and loaded.replacement is None
            if unchanged and stored is not None and stored.type_name == planned.type:
                self.num_copied += 1
                return stored.read()
            return self._rows(planned, loaded, target, found)

    def _rows(
        self, planned: PlannedTensor, loaded: LoadedWeight, target: Format | torch.dtype, found: list[TensorFidelity]
    ) -> NDArray[Any]:
        rule = planned.rule
        planes = None
        if loaded.layer is not None:
            merged, fidelity = measure(loaded, planned.name, target, self._own_importance(planned))
            found.append(fidelity)
            if isinstance(merged, torch.Tensor):
                return self._encode(planned, merged, target)
            planes = merged
        elif isinstance(target, Format) and loaded.is_copied(target):
            planes = loaded.planes(target)
        if planes is not None and rule.moves_bytes(planned.type):
            self.num_copied += loaded.layer is None
            return rule.split(planes["data"].cpu().numpy())[planned.part]
        return self._encode(planned, loaded.merged(torch.float32), target)

    def _own_importance(self, planned: PlannedTensor) -> torch.Tensor | None:
        """Returns the importance of the columns in the order of the parameter."""
        values = self.importance.get(planned.name)
        return None if values is None else torch.from_numpy(planned.rule.columns_from_file(values.numpy()))

    def _encode(self, planned: PlannedTensor, value: torch.Tensor, target: Format | torch.dtype) -> NDArray[Any]:
        """Returns the bytes of a tensor that is a part of a parameter with this value."""
        part = torch.from_numpy(planned.rule.values_in_file(value.detach().float().cpu().numpy())[planned.part])
        if isinstance(target, torch.dtype):
            return part.to(target).view(torch.uint8).numpy()
        rows = part.view(-1, planned.shape[-1])
        return target.encode(rows, self.importance.get(planned.name), name=planned.name)["data"].cpu().numpy()
