"""Writes safetensors files tensor by tensor, with one tensor in memory at a time.

The header of a safetensors file precedes its tensors but is known only after the last one.  So the writer reserves
space for it and pads it with spaces, which the format allows.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ingle.models.loading.safetensors_files import DTYPES

#: Small enough for file systems and uploads, large enough that few models need many shards.
SHARD_BYTES = 4_000_000_000

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes ``model.safetensors``, or numbered shards and their index.

    Args:
        folder: Output folder.
        num_tensors: Upper bound on the number of tensors; decides how much space is reserved for headers.
        shard_bytes: A shard is closed when the next tensor would make it larger.
    """

    def __init__(self, folder: Path, num_tensors: int, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._header_bytes = -(-(num_tensors * 400 + 1024) // 8) * 8
        self._shard_bytes = shard_bytes
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._position = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor."""
        assert all(name not in names for _, names in self._shards) and name not in self._header, f"{name} is duplicated"
        if self._file is None or (self._header and self._position + tensor.nbytes > self._shard_bytes):
            self._close()
            self._open()
        assert self._file is not None
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        end = self._position + data.nbytes
        self._header[name] = {
            "dtype": _NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self._position, end],
        }
        self._position = end
        self.num_bytes += data.nbytes

    def finish(self) -> list[Path]:
        """Closes the last file, renames the shards, writes their index, and returns their paths."""
        self._close()
        count = len(self._shards)
        if count == 1:
            final = self._folder / "model.safetensors"
            os.replace(self._shards[0][0], final)
            return [final]
        paths: list[Path] = []
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = self._folder / f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, final)
            paths.append(final)
            weight_map |= dict.fromkeys(names, final.name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return paths

    def _open(self) -> None:
        path = self._folder / f"shard-{len(self._shards) + 1}.safetensors"
        self._file = open(path, "wb")  # noqa: SIM115 - closed with the shard
        self._file.write(bytes(8 + self._header_bytes))
        self._shards.append((path, []))
        self._header, self._position = {}, 0

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}} | self._header).encode()
        assert len(header) <= self._header_bytes, "too little space was reserved for the header"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
        self._file.close()
        self._file = None
        self._shards[-1][1].extend(self._header)
