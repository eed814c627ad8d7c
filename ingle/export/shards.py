"""Writes safetensors files tensor by tensor: what is in memory is one tensor, never a shard.

The header of a safetensors file stands before its tensors and is known only when the last one is; so room for it is
left at the beginning and filled with spaces, which the format allows.

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

#: Small enough for file systems and uploads, large enough that few models need many.
SHARD_BYTES = 4_000_000_000

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes ``model.safetensors``, or numbered shards and their index.

    Args:
        folder: Where.
        num_tensors: At most so many will be written; decides how much room is left for headers.
        shard_bytes: A shard is closed when the next tensor would make it larger.
    """

    def __init__(self, folder: Path, num_tensors: int, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._room = -(-(num_tensors * 400 + 1024) // 8) * 8
        self._shard_bytes = shard_bytes
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._position = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor."""
        assert all(name not in names for _, names in self._shards) and name not in self._header, (
            f"{name} is there twice"
        )
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
        """Closes the last file and gives the files their names."""
        self._close()
        count = len(self._shards)
        if count == 1:
            final = self._folder / "model.safetensors"
            os.replace(self._shards[0][0], final)
            return [final]
        paths: list[Path] = []
        places: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = self._folder / f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, final)
            paths.append(final)
            places |= dict.fromkeys(names, final.name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(places.items()))}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return paths

    def _open(self) -> None:
        path = self._folder / f"shard-{len(self._shards) + 1}.safetensors"
        self._file = open(path, "wb")  # noqa: SIM115 - closed with the shard
        self._file.write(bytes(8 + self._room))
        self._shards.append((path, []))
        self._header, self._position = {}, 0

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}} | self._header).encode()
        assert len(header) <= self._room, "the room for a header was too small"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        self._file = None
        self._shards[-1][1].extend(self._header)
