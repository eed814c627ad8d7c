"""The weights on disk: which tensor lies in which safetensors file, and at which byte.

The headers are read here and the tensors are read with plain file reads straight into their own memory, not
through a memory map: a map keeps every page it has touched resident, so that a model would be held twice while
it loads.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle.errors import ModelError
from ingle.models.boundary import COMPARE_CONFIG, reading
from ingle.wording import count, some

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: A longer header is refused, as safetensors itself does.
_MAX_HEADER_BYTES = 100_000_000

#: More elements or bytes do not fit the 64 bits that torch counts with.
_MAX_COUNT = 2**63 - 1

#: What a header calls the types of tensors.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_DAMAGED = "fetch or copy the file again; it is damaged or incomplete"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        path: The safetensors file.
        dtype: Element type on disk.
        shape: Its shape.
        offset: First byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor in fresh host memory, in its type on disk."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, tensor: Tensor) -> None:
        """Reads into a contiguous tensor of the same type and shape in host memory.

        Raises:
            ModelError: When the file ends early.
        """
        assert tensor.dtype == self.dtype and tuple(tensor.shape) == self.shape and tensor.is_contiguous()
        if tensor.numel() == 0:
            return
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ModelError(f"{self.path.name} ends early.", where=str(self.path), fix=_DAMAGED)
                done += count


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name on disk.

    Raises:
        ModelError: When a file is missing, truncated, damaged, or the weights are in another format; it names
            the file.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_sharded(folder, index)
    single = folder / SINGLE_NAME
    if single.is_file():
        return _read_header(single)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and found[0].name != "adapter_model.safetensors":
        return _read_header(found[0])
    raise _no_weights(folder, found)


def refuse_larger(num_weights: int, folder: Path) -> None:
    """Refuses a model that has more weights than its files have bits; a folder without files passes.

    Raises:
        ModelError: The config describes another model than the files hold, or a file is damaged.
    """
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not num_bytes or num_weights <= 8 * num_bytes:
        return
    read_index(folder)  # a file that is cut short is the better reason
    raise ModelError(
        f"config.json describes {count(num_weights)} weights, and the files hold {count(num_bytes)} bytes.",
        where=str(folder / "config.json"),
        why="a size in it (vocab_size, hidden_size, intermediate_size, number of layers or experts) is too large",
        fix=COMPARE_CONFIG,
    )


def _read_sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weight files are missing: {some(missing)}.",
            where=str(folder),
            fix="fetch or copy the missing files",
        )
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for key, entry in _read_header(folder / name).items():
            if key in tensors:
                raise ModelError(
                    f"The weight {key} is in two files.",
                    where=f"{tensors[key].path.name} and {name}",
                    fix="keep one complete set of shards in the folder",
                )
            tensors[key] = entry
    absent = sorted(key for key in weight_map if key not in tensors)
    if absent:
        raise ModelError(
            f"{len(absent)} weights named in {index.name} are in no file: {some(absent)}.",
            where=str(folder / weight_map[absent[0]]),
            fix=_DAMAGED,
        )
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    """The file that each weight lies in, as the index has it."""
    with reading(index, f"{index.name} is not a shard index.", fix=_DAMAGED):
        weight_map = _read_object(index.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map must be an object that is not empty")
        for key, name in weight_map.items():
            if not isinstance(name, str) or "\0" in name or Path(name).name != name:
                raise ValueError(f"{key[:100]!r} must lie in a file of this folder, not in {str(name)[:100]!r}")
    return dict(weight_map)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if prefix.startswith(b"version "):
            raise ModelError(
                f"{path.name} is a Git LFS pointer, not the weights.", where=str(path), fix="run `git lfs pull`"
            )
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"{size:,} bytes do not begin with a safetensors header")
        raw = file.read(length)
    with reading(path, f"{path.name} is not a whole safetensors file.", fix=_DAMAGED):
        header = _read_object(raw)
    metadata = header.pop("__metadata__", None)
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise _damaged(path, "its __metadata__ is not an object of texts")
    tensors = {key: _entry(path, 8 + length, key, value) for key, value in header.items()}
    _require_contiguous(path, tensors, 8 + length, size)
    return tensors


def _read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in which no key occurs twice.

    Raises:
        ValueError: It is something else.
        RecursionError: It is nested too deeply.
    """
    value = json.loads(raw, object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return found


def _entry(path: Path, start: int, key: str, value: Any) -> StoredTensor:
    """One line of a header, checked before anything is made of it."""
    name = f"the tensor {key[:100]!r}"
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise _damaged(path, f"{name} has no dtype")
    if value["dtype"] not in DTYPES:
        raise ModelError(
            f"{path.name} holds tensors of type {value['dtype'][:100]}, which are not supported.", where=str(path)
        )
    sizes: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not _are_sizes(sizes) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name} has no shape or no data_offsets of whole numbers")
    if prod(max(size, 1) for size in sizes) > _MAX_COUNT:
        raise _damaged(path, f"{name} has more elements than can be counted")
    entry = StoredTensor(path, DTYPES[value["dtype"]], tuple(sizes), start + offsets[0])
    if entry.num_bytes != offsets[1] - offsets[0]:
        raise _damaged(
            path, f"{name} takes {entry.num_bytes:,} bytes and lies from byte {offsets[0]:,} to {offsets[1]:,}"
        )
    return entry


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def _require_contiguous(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Refuses tensors that share bytes, and bytes of no tensor: the format forbids both."""
    end, before = start, "the header"
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            what = "share bytes" if entry.offset < end else "have bytes of no tensor between them"
            raise _damaged(path, f"{before[:100]} and {key[:100]} {what}")
        end, before = entry.offset + entry.num_bytes, key
    if end != size:
        raise _damaged(path, f"it holds {size:,} bytes, and its last tensor ends at {end:,}")


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path.name} is not a whole safetensors file.", where=str(path), why=why, fix=_DAMAGED)


def _no_weights(folder: Path, found: list[Path]) -> ModelError:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return ModelError(
            "The weights are Python pickles, which can run code when they are read; Ingle reads safetensors only.",
            where=str(folder),
            fix="convert once: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) in a place you trust",
        )
    if (folder / "adapter_config.json").is_file():
        return ModelError(
            "The folder holds an adapter, not a model.",
            where=str(folder),
            fix="put the base model into model.id and this folder into adapter.path",
        )
    if any(folder.glob("*.gguf")):
        return ModelError(
            "A GGUF file is a model by itself.",
            where=str(folder),
            fix=f"--model.id={min(folder.glob('*.gguf'))}",
        )
    if found:
        return ModelError(
            f"The folder holds {len(found)} weight files and no {INDEX_NAME} that says which belongs where.",
            where=str(folder),
            fix=f"fetch {INDEX_NAME} too",
        )
    return ModelError(
        f"The folder holds no weights (no {SINGLE_NAME}, no {INDEX_NAME}).",
        where=str(folder),
        fix="fetch the .safetensors files, or set model.init=random to start from nothing",
    )
