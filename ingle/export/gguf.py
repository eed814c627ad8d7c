"""A GGUF file of the merged, or untouched, model: the types of its tensors, its metadata, its tokenizer.

A tensor that no adapter touches and whose base is held in the type it gets is copied byte for byte.  Everything else is
packed from the merged weight; rows are put into llama.cpp's order after packing, which is exact since a block never
crosses a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from ingle.export.fidelity import TensorFidelity, measure
from ingle.export.gguf_types import AS_TRAINED, target_of
from ingle.export.merging import Loaded, Merger
from ingle.gguf import GgufFile, TensorToWrite, vocabulary, write_gguf
from ingle.gguf import architecture as shapes
from ingle.gguf.container import row_bytes
from ingle.gguf.imatrix import read_imatrix
from ingle.gguf.mixes import file_type_number, is_quantized, mix_of
from ingle.gguf.names import ROPE_FREQS, names_of
from ingle.gguf.rotary import rope_divisors
from ingle.models.loading.weight_stream import WeightEntry
from ingle.quant.format import PLAIN, Format


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the file.

    Attributes:
        name: GGUF's.
        entry: Where it comes from; None for a weight that was trained apart from the one it was tied to.
        hf_name: The parameter's in the model.
        shape: Outermost size first.
        type: ggml's, lower case.
    """

    name: str
    entry: WeightEntry | None
    hf_name: str
    shape: tuple[int, ...]
    type: str

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


@dataclass
class GgufExport:
    """A GGUF file to be written.

    Args:
        merger: Base and adapter.
        tokenizer: Its tokenizer.
        type: ``--type``; :data:`AS_TRAINED` keeps each tensor's format.
        importance: Importance by GGUF name, ``[columns]``.
        base_file: The GGUF file that the base is; what nothing touches is copied from it.

    Attributes:
        planned: The tensors, in the order of the file.

    Raises:
        GgufError: llama.cpp has no such architecture, tokenizer or weight.
        ConfigError: There is no such type.
    """

    merger: Merger
    tokenizer: Any
    type: str
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base_file: GgufFile | None = None

    def __post_init__(self) -> None:
        model = self.merger.stream.model
        self._config: dict[str, Any] = model.config.to_dict()
        self._described = shapes.to_metadata(self._config)
        self.names = names_of(self._described)
        self._num_copied = 0
        self.planned = self._plan()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(planned.num_bytes for planned in self.planned)

    @property
    def is_quantized(self) -> bool:
        """Whether the file holds blocks, and not plain numbers alone."""
        return any(planned.type not in PLAIN for planned in self.planned)

    @property
    def num_copied(self) -> int:
        """Weights whose bytes are those of the base."""
        return self._num_copied

    def promote(self, types: Mapping[str, str]) -> None:
        """Gives tensors other types, by GGUF name."""
        self.planned = [Planned(p.name, p.entry, p.hf_name, p.shape, types.get(p.name, p.type)) for p in self.planned]

    def write(self, path: Path, metadata: Mapping[str, Any], *, sink: Sink | None = None) -> list[TensorFidelity]:
        """Writes the file.

        Args:
            path: Where.
            metadata: What else it says of itself (``general.name`` and the like).
            sink: Gets the progress.

        Returns:
            What survived of every merged weight.
        """
        found: list[TensorFidelity] = []
        done = 0

        def data(planned: Planned) -> Callable[[], NDArray[Any]]:
            def read() -> NDArray[Any]:
                nonlocal done
                packed = self._pack(planned, found)
                done += 1
                if sink is not None and (done % 16 == 0 or done == len(self.planned)):
                    sink(Progress("writing weights", done, len(self.planned)))
                return packed

            return read

        tensors = [TensorToWrite(p.name, p.type, p.shape, data(p)) for p in self.planned]
        divisors = rope_divisors(self._config)
        own_divisors = None if self.base_file is None else self.base_file.tensors.get(ROPE_FREQS)
        if own_divisors is not None:
            tensors.append(TensorToWrite(ROPE_FREQS, own_divisors.type_name, own_divisors.shape, own_divisors.read))
        elif divisors is not None:
            tensors.append(TensorToWrite(ROPE_FREQS, "f32", divisors.shape, lambda: divisors))
        write_gguf(path, self.metadata() | dict(metadata), tensors)
        return found

    def metadata(self) -> dict[str, Any]:
        """Shape, tokenizer and file type."""
        model, tokenizer = self.merger.stream.model, self.tokenizer
        ends = models.end_token_ids(model, tokenizer)
        first = tokenizer.eos_token_id
        ordered = sorted(ends, key=lambda number: (number != first, number))
        words = vocabulary.to_metadata(
            json.loads(tokenizer.backend_tokenizer.to_str()),
            vocab_size=self._config["vocab_size"],
            special={f"{key}_token": getattr(tokenizer, f"{key}_token") for key in ("bos", "eos", "unk", "pad")},
            end_token_ids=ordered,
            chat_template=tokenizer.chat_template or None,
        )
        kind = int(LlamaFileType.GUESSED)
        if self.type != AS_TRAINED:
            kind = file_type_number(self.type)
        elif self.base_file is not None:
            kind = int(self.base_file.metadata.get("general.file_type", kind))
        about = {"general.type": "model", "general.file_type": kind}
        if self.is_quantized:
            about["general.quantization_version"] = GGML_QUANT_VERSION
        return self._described | about | words

    def measure_as(self, planned: Planned, type_name: str) -> TensorFidelity:
        """What would survive of a merged weight in another type."""
        assert planned.entry is not None
        with self.merger.loaded(planned.entry) as loaded:
            return measure(loaded, planned.name, target_of(type_name), self.importance.get(planned.name))[1]

    def _plan(self) -> list[Planned]:
        planned = []
        entries: list[tuple[str, WeightEntry | None, tuple[int, ...]]] = []
        for stored in self.merger.stream.entries:
            if len(stored.pieces) != 1:
                raise GgufError("Models with experts cannot be written to GGUF yet.", where=stored.name)
            entries.append((stored.name, stored, stored.pieces[0].shape))
        entries += [(name, None, tuple(self.merger.trained[name].shape)) for name in self.merger.untied]
        named = {name: self._name(name) for name, _, _ in entries}
        mix = None
        if self.type != AS_TRAINED:
            tied = "output.weight" not in named.values()
            mix = mix_of(self.type, self._described, tied=tied, has_imatrix=bool(self.importance))
        for name, entry, shape in entries:
            gguf_name = named[name]
            kind = self._own_type(name, gguf_name, shape) if mix is None else mix.tensor_type(gguf_name, shape)
            planned.append(Planned(gguf_name, entry, name, shape, kind))
        self._require_packable(planned)
        return planned

    def _require_packable(self, planned: list[Planned]) -> None:
        """Refuses to merge into formats that are only read, before anything is measured or written."""
        merged = [each for each in planned if each.hf_name in self.merger.layers and each.type not in PLAIN]
        for kind, name in {each.type: each.name for each in merged}.items():
            reason = why_not_quantized(kind)
            if reason is not None:
                raise ConfigError(
                    f"A merged weight cannot be packed in {kind}: Ingle only reads that format.",
                    where=name,
                    why=reason,
                    fix="--type q8_0 or another type of llama.cpp; --to gguf-adapter leaves the base as it is",
                )

    def _name(self, name: str) -> str:
        found = self.names.to_gguf(name)
        if found is None:
            raise GgufError(
                f"llama.cpp has no tensor for {name} in a model of architecture {self.names.architecture}.",
                where=name,
                fix="--to safetensors",
            )
        return found

    def _own_type(self, name: str, gguf_name: str, shape: tuple[int, ...]) -> str:
        """What a weight is held in while it trains, or what the base's file has it in; vectors are float32."""
        if self.base_file is not None and gguf_name in self.base_file.tensors:
            return self.base_file.tensors[gguf_name].type_name
        if not is_quantized(gguf_name, shape):
            return "f32"
        holder = self.merger.stream.holder(name)
        format: Any = getattr(holder, "format", None) if name.endswith(".weight") else None
        if format is not None:
            return str(format.name)
        dtype = self.merger.trained[name].dtype if name in self.merger.trained else holder.get_parameter("weight").dtype
        return next(kind for kind, plain in PLAIN.items() if plain == dtype)

    def _pack(self, planned: Planned, found: list[TensorFidelity]) -> NDArray[Any]:
        """The tensor's bytes, rows in llama.cpp's order."""
        target = target_of(planned.type)
        if planned.entry is None:
            return _to_numpy(self.merger.trained[planned.hf_name], target, planned.name)
        with self.merger.loaded(planned.entry) as loaded:
            stored = None if self.base_file is None else self.base_file.tensors.get(planned.name)
            untouched = loaded.layer is None and loaded.trained is None
            if untouched and stored is not None and stored.type_name == planned.type:
                self._num_copied += 1
                return stored.read()
            rows = self._rows(planned, loaded, target, found)
        order = self.names.permutation(planned.name, len(rows))
        return rows if order is None else np.ascontiguousarray(rows[order])

    def _rows(
        self, planned: Planned, loaded: Loaded, target: Format | torch.dtype, found: list[TensorFidelity]
    ) -> NDArray[Any]:
        importance = self.importance.get(planned.name)
        if loaded.layer is not None:
            packed, fidelity = measure(loaded, planned.name, target, importance)
            found.append(fidelity)
            return _bytes(packed) if isinstance(packed, torch.Tensor) else packed["data"].cpu().numpy()
        if isinstance(target, torch.dtype):
            value = loaded.merged(torch.float32) + self.names.offset(planned.name)
            return _bytes(value.to(target))
        self._num_copied += loaded.is_copied(target)
        return loaded.planes(target, importance)["data"].cpu().numpy()


def read_importance(path: Path) -> dict[str, torch.Tensor]:
    """The importance of every weight's columns, by GGUF name, from an importance matrix of llama.cpp's."""
    return {name: torch.from_numpy(entry.mean[0]) for name, entry in read_imatrix(path).entries.items()}


def _to_numpy(value: torch.Tensor, target: Format | torch.dtype, name: str) -> NDArray[Any]:
    if isinstance(target, torch.dtype):
        return _bytes(value.to(target))
    return target.encode(value.float(), name=name)["data"].cpu().numpy()


def _bytes(value: torch.Tensor) -> NDArray[Any]:
    """A tensor's bytes, one row a row; a vector is a column."""
    rows = value.detach().cpu().contiguous()
    return (rows if rows.dim() > 1 else rows.unsqueeze(1)).view(torch.uint8).numpy()
