"""The safetensors reader against the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ingle.errors import ModelError
from ingle.models.loading.safetensors_files import read_index


def test_every_type_and_shape_is_read_as_safetensors_writes_it(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "bytes": torch.arange(200, dtype=torch.uint8).reshape(4, 50),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = read_index(tmp_path)
    assert index.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = index[name].read()
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float()), name
        assert index[name].num_bytes == tensor.numel() * tensor.itemsize


def test_reads_into_memory_that_is_there(tmp_path: Path) -> None:
    save_file({"a": torch.randn(2, 2), "b": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    place = torch.zeros(2, 3)
    read_index(tmp_path)["b"].read_into(place)
    assert torch.equal(place, torch.arange(6.0).reshape(2, 3))


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_weight_in_two_shards_is_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    shard(tmp_path, {"w": "one.safetensors", "v": "two.safetensors"})
    with pytest.raises(ModelError, match="w is in two files"):
        read_index(tmp_path)


def test_a_weight_of_the_index_that_is_in_no_shard_is_an_error(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "one.safetensors")
    shard(tmp_path, {"w": "one.safetensors", "v": "one.safetensors"})
    with pytest.raises(ModelError, match="v") as error:
        read_index(tmp_path)
    assert "one.safetensors" in str(error.value)


def test_a_broken_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="not a shard index"):
        read_index(tmp_path)


def test_several_files_without_an_index_are_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        read_index(tmp_path)


def header(content: dict[str, object], data: bytes) -> bytes:
    raw = json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)),
        header({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        header({"w": {"dtype": "X1", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff" + bytes(8),
    ],
    ids=["empty", "short header", "sizes", "truncated", "no offsets", "type", "no json"],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_index(tmp_path)


def test_an_adapter_folder_is_told_from_a_model(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter, not a model"):
        read_index(tmp_path)
