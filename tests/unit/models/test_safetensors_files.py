"""The reader of safetensors files against the safetensors library, and its errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ingle.errors import ModelError
from ingle.models.loading.safetensors_files import read_index


def test_every_dtype_and_shape_is_read_as_safetensors_writes_it(tmp_path: Path) -> None:
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


def test_rows_are_read_into_existing_memory(tmp_path: Path) -> None:
    save_file({"a": torch.randn(2, 2), "b": torch.arange(12.0).reshape(4, 3)}, tmp_path / "model.safetensors")
    place = torch.zeros(2, 3)
    read_index(tmp_path)["b"].select_rows(range(1, 3)).read_into(place)
    assert torch.equal(place, torch.arange(3.0, 9.0).reshape(2, 3))


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: dict[str, object], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def store_twice(folder: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": torch.zeros(1)}, folder / f"{name}.safetensors")
    write_index(folder, {"w": "one.safetensors", "v": "two.safetensors"})


def store_less(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "one.safetensors")
    write_index(folder, {"w": "one.safetensors", "v": "one.safetensors"})


def store_without_index(folder: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.zeros(1)}, folder / f"{name}.safetensors")


def store_adapter(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "in two shards": (store_twice, "w is in two files"),
    "in no shard": (store_less, r"missing from the files: v(.|\n)*one\.safetensors"),
    "shard missing": (lambda folder: write_index(folder, {"w": "two.safetensors"}), r"missing: two\.safetensors"),
    "no index": (store_without_index, r"no model\.safetensors\.index\.json"),
    "adapter": (store_adapter, "adapter, not a model"),
    "pickle": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "pickles"),
    "nothing": (lambda folder: None, "contains no weights"),
}
_DAMAGED_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "not a complete"),
    "short header": (lambda file: file.write_bytes(b"\x10" + bytes(7) + b"{}"), "not a complete"),
    "no header": (lambda file: file.write_bytes(b"\xff" * 1000), "not a complete"),
    "no JSON": (lambda file: file.write_bytes(struct.pack("<Q", 4) + b"\xff" * 4 + bytes(8)), "not a complete"),
    "sizes": (lambda file: write_raw(file, entry(data_offsets=[0, 4]), bytes(4)), "not a complete"),
    "negative": (lambda file: write_raw(file, entry(shape=[-1, -2]), bytes(8)), "not a complete"),
    "truncated": (lambda file: write_raw(file, entry(), bytes(7)), "not a complete"),
    "too long": (lambda file: write_raw(file, entry(), bytes(9)), "not a complete"),
    "no offsets": (lambda file: write_raw(file, {"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "not a complete"),
    "unknown dtype": (lambda file: write_raw(file, entry(dtype="X1"), bytes(8)), "not a complete"),
    "other dtype": (lambda file: write_raw(file, entry(dtype="C64", data_offsets=[0, 16]), bytes(16)), "type C64"),
    "pointer": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_weights_that_are_missing_or_of_another_kind_are_refused(tmp_path: Path, damage: str) -> None:
    write, message = _DAMAGE[damage]
    write(tmp_path)
    with pytest.raises(ModelError) as error:
        read_index(tmp_path)
    assert error.match(message)


@pytest.mark.parametrize("damage", _DAMAGED_FILES)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    write, message = _DAMAGED_FILES[damage]
    write(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"model\.safetensors (is|contains).* {message}") as error:
        read_index(tmp_path)
    assert str(tmp_path) in str(error.value.where)
