"""Safetensors written tensor by tensor are read by safetensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from ingle.export.writers.shards import ShardWriter


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(8, 16).bfloat16(),
        "b.weight": torch.randint(0, 255, (5, 7), dtype=torch.uint8),
        "c.scalar": torch.tensor(3.5),
        "d.empty": torch.empty(0, 4),
        "e.half": torch.randn(3).half(),
    }


def test_one_file_holds_what_was_added(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, num_tensors=5)
    for name, tensor in _tensors().items():
        writer.add(name, tensor)
    (path,) = writer.finish()
    read = load_file(path)
    assert path.name == "model.safetensors"
    assert read.keys() == _tensors().keys()
    for name, tensor in _tensors().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_shards_are_named_counted_and_indexed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, num_tensors=5, shard_bytes=256)
    for name, tensor in _tensors().items():
        writer.add(name, tensor)
    paths = writer.finish()
    assert [path.name for path in paths] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in _tensors().values())
    for name, tensor in _tensors().items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor), name


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    writer = ShardWriter(tmp_path, num_tensors=1)
    writer.add("t", tensor)
    assert torch.equal(load_file(writer.finish()[0])["t"], tensor)
