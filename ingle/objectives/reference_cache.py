"""Keeps the log-probabilities of a reference on disk, by the content of the answers.

A value belongs to the tokens of a text and to what computed it, and to nothing else: no run, objective, batch or place
in a data set. So epochs, runs and objectives with the same reference share them, and a row that is edited
misses alone. Values that other batches have computed differ in their last bits, so a resumed run reads only the files
that it read before, and those that it wrote itself.

Legend: T supervised tokens of an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from ingle import env
from ingle.atomic import write_atomically
from ingle.data.batch import Batch
from ingle.errors import IngleError

Values = npt.NDArray[np.float32]

_KEY_BYTES = 16
#: New values are written when they take this much or are this old, and with every checkpoint.
_FLUSH_BYTES, _FLUSH_S = 4 << 20, 60.0
#: Share of the free disk that all references may take together.
_SHARE_OF_DISK = 8


def answer_keys(batch: Batch) -> list[bytes]:
    """Returns a digest of each answer with its prompt: its tokens, and which of them are supervised.

    It does not depend on whether the prompt is shared.
    """
    is_decoder = "decoder_labels" in batch.columns
    rows = [_documents(batch.input_ids, batch.cu_seqlens)]
    if is_decoder:
        bounds = batch.columns["decoder_cu_seqlens"]
        rows += [_documents(batch.columns[name], bounds) for name in ("decoder_input_ids", "decoder_labels")]
    else:
        rows.append(_documents(batch.labels, batch.cu_seqlens))
    parents = batch.parents()
    keys = []
    for answer in batch.answers().tolist():
        path = [answer]
        while parents is not None and parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for number, row in enumerate(rows):
            parts = path if number == 0 or not is_decoder else [answer]
            tokens = np.concatenate([row[document] for document in parts])
            digest.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i4").tobytes())
        keys.append(digest.digest())
    return keys


def _documents(row: Tensor, bounds: Tensor) -> list[npt.NDArray[np.int64]]:
    return np.split(row[0].cpu().numpy(), bounds[1:-1].cpu().numpy())


def open_cache(digest: str, config: Any, dtype: torch.dtype, device: torch.device) -> ReferenceCache:
    """Opens the values of a reference, and removes those that were unused for the longest time if the disk is full.

    Args:
        digest: Identifies the weights: :func:`ingle.adapters.initial_digest`.
        config: That of the model, which says what it computes with them: rotary frequencies, caps of logits and so on.
        dtype: The dtype of the computation.
        device: The device that computes.
    """
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    options = json.loads(config.to_json_string(use_diff=False))
    options = {name: value for name, value in options.items() if name not in _NAMES}
    libraries = [f"{name} {version(name)}" for name in _LIBRARIES]
    known = [digest, options, str(dtype), machine, env.code_digest(), *libraries]
    root = env.cache_folder() / "references"
    folder = root / hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        _make_room(root, keep=folder)
    return ReferenceCache(folder)


_LIBRARIES = ("torch", "transformers", "numba")
#: Options of a model that change nothing of what it computes.
_NAMES = ("_name_or_path", "transformers_version", "architectures", "dtype")


def _make_room(root: Path, keep: Path) -> None:
    found = sorted((folder.stat().st_mtime, folder) for folder in root.iterdir() if folder.is_dir())
    sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for _, folder in found}
    used = sum(sizes.values())
    limit = (used + shutil.disk_usage(root).free) // _SHARE_OF_DISK
    for _, folder in found:
        if used <= limit:
            return
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            used -= sizes[folder]


class ReferenceCache:
    """The values of one reference. A folder that cannot be read or written only costs time.

    Args:
        folder: The folder of its files.

    Attributes:
        files: Names of the files that were read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._values: dict[bytes, Values] = {}
        self._new: dict[bytes, Values] = {}
        self._flushed = time.monotonic()
        self.files: list[str] = []
        self._read(sorted(path.name for path in folder.glob("*.safetensors")))

    def find(self, keys: Sequence[bytes]) -> list[Values] | None:
        """Returns the values of each answer, float32 [T]; None if one of them is missing."""
        found = [self._values.get(key) for key in keys]
        return None if any(each is None for each in found) else found  # type: ignore[return-value]

    def add(self, keys: Sequence[bytes], values: Sequence[Values]) -> None:
        """Keeps the values of answers; those that it has already stay as they are."""
        new = {key: value for key, value in zip(keys, values, strict=True) if key not in self._values}
        self._values |= new
        self._new |= new
        is_old = time.monotonic() - self._flushed >= _FLUSH_S
        if is_old or sum(value.nbytes + _KEY_BYTES for value in self._new.values()) >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes new values into a file of their own."""
        self._flushed = time.monotonic()
        if not self._new:
            return
        keys = b"".join(self._new)
        tensors: dict[str, npt.NDArray[Any]] = {
            "keys": np.frombuffer(keys, np.uint8),
            "ends": np.cumsum([len(value) for value in self._new.values()], dtype=np.int64),
            "logps": np.concatenate([np.zeros(0, np.float32), *self._new.values()]),
        }
        content = save(tensors | {"digest": _digest(tensors)})
        name = f"{hashlib.sha256(keys).hexdigest()[:24]}.safetensors"
        with suppress(OSError, IngleError):
            write_atomically(self._folder / name, content)
        self._new = {}
        self.files.append(name)

    def limit(self, files: Sequence[str]) -> None:
        """Forgets all values but those of some files."""
        self._values, self._new, self.files = {}, {}, []
        self._read(files)

    def _read(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(OSError, SafetensorError, KeyError, ValueError):
                for key, value in _entries((self._folder / name).read_bytes()):
                    self._values.setdefault(key, value)
                self.files.append(name)


def _entries(content: bytes) -> Iterator[tuple[bytes, Values]]:
    tensors = load(content)
    if not np.array_equal(tensors.pop("digest"), _digest(tensors)):
        raise ValueError("the file is damaged")
    keys, ends = tensors["keys"].tobytes(), tensors["ends"]
    values = np.split(tensors["logps"], ends[:-1])
    for number, value in enumerate(values):
        yield keys[number * _KEY_BYTES : (number + 1) * _KEY_BYTES], value


def _digest(tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Returns a digest of the content of a file: a disk may change what it was given."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return np.frombuffer(digest.digest(), np.uint8)
