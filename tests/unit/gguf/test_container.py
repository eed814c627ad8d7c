"""Compares reading and writing of GGUF files with the ``gguf`` package."""

from __future__ import annotations

import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from ingle.errors import GgufError
from ingle.gguf import TensorToWrite, read_gguf, write_gguf

METADATA = {
    "general.architecture": "llama",
    "general.name": "a näme",
    "llama.block_count": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e6,
    "some.negative": -3,
    "some.flag": True,
    "tokenizer.ggml.tokens": ["<s>", "Ġhé", "", "\n"],
    "tokenizer.ggml.scores": [0.5, -1.25, 3.0],
    "tokenizer.ggml.token_type": [1, 3, 6],
    "some.flags": [True, False],
}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "token_embd.weight": rng.standard_normal((7, 64)).astype(np.float32),
        "blk.0.attn_norm.weight": rng.standard_normal(5).astype(np.float32),
        "blk.0.half.weight": rng.standard_normal((3, 5)).astype(np.float16),
        "blk.0.ffn_down_exps.weight": rng.standard_normal((2, 3, 32)).astype(np.float32),
    }


def to_write() -> list[TensorToWrite]:
    tensors = []
    for name, array in arrays().items():
        kind = {np.dtype(np.float16): "f16", np.dtype(np.float32): "f32"}[array.dtype]
        if "exps" in name:
            data = quants.quantize(array, GGMLQuantizationType.Q8_0)
            tensors.append(TensorToWrite(name, "q8_0", array.shape, lambda data=data: data))
        else:
            tensors.append(TensorToWrite(name, kind, array.shape, lambda array=array: array))
    return tensors


def write_with_package(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "a näme")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e6)
    writer.add_int32("some.negative", -3)
    writer.add_bool("some.flag", True)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "some.flags"):
        writer.add_array(key, METADATA[key])
    for tensor in to_write():
        kind = GGMLQuantizationType[tensor.type_name.upper()]
        writer.add_tensor(tensor.name, tensor.data(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    write_with_package(tmp_path / "theirs.gguf")
    write_gguf(tmp_path / "ours.gguf", METADATA, to_write())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    write_gguf(tmp_path / "ours.gguf", METADATA, to_write())
    reader = GGUFReader(tmp_path / "ours.gguf")
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    for tensor in reader.tensors:
        expected = arrays()[tensor.name]
        assert list(tensor.shape) == list(expected.shape[::-1])
        decoded = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(decoded.reshape(expected.shape) - expected.astype(np.float32)).max() < 0.02


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    write_with_package(tmp_path / "theirs.gguf")
    file = read_gguf(tmp_path / "theirs.gguf")
    assert file.metadata == METADATA
    assert list(file.tensors) == list(arrays())
    for tensor in to_write():
        read = file.tensors[tensor.name]
        assert (read.shape, read.type_name, read.num_bytes) == (tensor.shape, tensor.type_name, tensor.num_bytes)
        assert read.read().shape == (read.num_rows, read.row_bytes)
        assert read.read().tobytes() == tensor.data().tobytes()


def test_every_scalar_type_is_read_and_the_alignment_is_kept(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint8("a.byte", 7)
    writer.add_uint64("a.long", 7)
    writer.add_float64("a.double", 0.1)
    writer.add_custom_alignment(64)
    writer.add_tensor("x", np.arange(3, dtype=np.float32))
    writer.add_tensor("y", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "theirs.gguf")
    copies = [TensorToWrite(t.name, t.type_name, t.shape, t.read) for t in file.tensors.values()]
    write_gguf(tmp_path / "copy.gguf", file.metadata, copies)
    copy = read_gguf(tmp_path / "copy.gguf")
    assert copy.metadata == file.metadata and file.metadata["a.double"] == 0.1 and file.metadata["a.byte"] == 7
    for name, tensor in copy.tensors.items():
        assert tensor.offset % 64 == 0 and tensor.read().tobytes() == file.tensors[name].read().tobytes()


def test_files_of_a_split_model_are_one(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=1)
    for name in ("a", "b", "c"):
        writer.add_tensor(name, np.full((2, 3), ord(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) == 3
    for path in paths:  # any of them names the model
        file = read_gguf(path)
        assert list(file.tensors) == ["a", "b", "c"]
        assert file.path == paths[0] and set(file.metadata) == {"general.architecture"}
        assert file.tensors["c"].read().view(np.float32).tolist() == [[99.0] * 3] * 2
    paths[1].unlink()
    with pytest.raises(GgufError, match=r"1 of the 3 files .* model-00002-of-00003\.gguf"):
        read_gguf(paths[0])


def test_a_file_that_ends_anywhere_is_damaged(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", METADATA, to_write())
    whole = (tmp_path / "whole.gguf").read_bytes()
    last = to_write()[-1].num_bytes
    end = max(tensor.offset + tensor.num_bytes for tensor in read_gguf(tmp_path / "whole.gguf").tensors.values())
    assert len(whole) - last > 0
    for length in [*range(0, end - last, 7), end - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(GgufError):
            read_gguf(tmp_path / "cut.gguf")


def test_invalid_files_are_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"

    def message() -> str:
        with pytest.raises(GgufError) as info:
            read_gguf(path)
        return str(info.value)

    assert "cannot be read" in message()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in message()
    path.write_bytes(b"PK\3\4")
    assert "not a GGUF file" in message()
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 4, 0, 0))
    assert "GGUF version 4 is not supported" in message()
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "big-endian" in message()
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60))
    assert "end inside the header" in message()
    name = struct.pack("<Q", 1) + b"x"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<IQIQ", 1, 32, 999, 0))
    assert "number 999" in message()
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<IQIQ", 1, 31, 8, 0) + bytes(99))
    assert "not a multiple of the block size 32 of q8_0" in message()
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<IQIQ", 1, 2**62, 0, 0))
    assert "ends at byte" in message()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def fail() -> np.ndarray:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_gguf(path, METADATA, [*to_write(), TensorToWrite("z", "f32", (2,), fail)])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_only_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def make() -> np.ndarray:
        assert all(reference() is None for reference in alive)
        array = np.zeros((4, 4), np.float32)
        alive.append(weakref.ref(array))
        return array

    write_gguf(tmp_path / "x.gguf", METADATA, [TensorToWrite(f"t{i}", "f32", (4, 4), make) for i in range(4)])
    assert len(alive) == 4
