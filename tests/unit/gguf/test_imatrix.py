"""Tests files of importance matrices: llama.cpp's layout, round trips, and the older format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from ingle.errors import GgufError
from ingle.gguf import TensorToWrite, write_gguf
from ingle.gguf.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix


def matrix() -> Imatrix:
    rng = np.random.default_rng(0)
    plain = ImatrixEntry(rng.random((1, 64), np.float32), np.array([512], np.float32))
    experts = ImatrixEntry(rng.random((3, 32), np.float32), np.array([200, 0, 312], np.float32))
    entries = {"blk.1.attn_q.weight": plain, "blk.0.ffn_up_exps.weight": experts}
    return Imatrix(entries, ("a.txt", "b.jsonl"), 2, 256)


def test_the_layout_is_llama_cpps(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", matrix())
    reader = GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["a.txt", "b.jsonl"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 256)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [
        "blk.0.ffn_up_exps.weight.in_sum2",
        "blk.0.ffn_up_exps.weight.counts",
        "blk.1.attn_q.weight.in_sum2",
        "blk.1.attn_q.weight.counts",
    ]
    assert [int(size) for size in tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape] == [32, 3]  # innermost first
    assert [int(size) for size in tensors["blk.0.ffn_up_exps.weight.counts"].shape] == [1, 3]
    np.testing.assert_array_equal(
        tensors["blk.1.attn_q.weight.in_sum2"].data.reshape(-1), matrix().entries["blk.1.attn_q.weight"].sums[0]
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", matrix())
    back = read_imatrix(tmp_path / "m.gguf")
    assert (back.datasets, back.chunk_count, back.chunk_size) == (("a.txt", "b.jsonl"), 2, 256)
    for name, entry in matrix().entries.items():
        np.testing.assert_array_equal(back.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(back.entries[name].counts, entry.counts)


def test_importance_is_the_mean_and_one_where_nothing_came_by() -> None:
    entry = matrix().entries["blk.0.ffn_up_exps.weight"]
    np.testing.assert_array_equal(entry.mean[0], entry.sums[0] / np.float32(200))
    np.testing.assert_array_equal(entry.mean[1], np.ones(32, np.float32))


def legacy(path: Path) -> None:
    means = np.arange(8, dtype=np.float32)
    content = struct.pack("<i", 1) + struct.pack("<i", 6) + b"blk.0w" + struct.pack("<ii", 5, 8)
    content += (means * 5).tobytes() + struct.pack("<ii", 5, 5) + b"a.txt"
    path.write_bytes(content)


def test_the_older_format_gives_the_same_means(tmp_path: Path) -> None:
    legacy(tmp_path / "m.dat")
    found = read_imatrix(tmp_path / "m.dat")
    np.testing.assert_allclose(found.entries["blk.0w"].mean[0], np.arange(8), rtol=1e-6)
    assert (found.datasets, found.chunk_count) == (("a.txt",), 5)


@pytest.mark.parametrize("cut", [2, 10, 20, 40])
def test_a_damaged_file_is_told(tmp_path: Path, cut: int) -> None:
    legacy(tmp_path / "m.dat")
    (tmp_path / "cut.dat").write_bytes((tmp_path / "m.dat").read_bytes()[:cut])
    with pytest.raises(GgufError, match="importance matrix"):
        read_imatrix(tmp_path / "cut.dat")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("this is no matrix at all, only text")
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, [])
    for name in ("text.txt", "model.gguf"):
        with pytest.raises(GgufError, match="importance matrix"):
            read_imatrix(tmp_path / name)
    with pytest.raises(GgufError, match="cannot be read"):
        read_imatrix(tmp_path / "missing.gguf")


def test_sums_without_counts_or_below_zero_are_refused(tmp_path: Path) -> None:
    values = np.ones((1, 4), np.float32)
    sums = TensorToWrite("w.in_sum2", "f32", (1, 4), lambda: values)
    write_gguf(tmp_path / "a.gguf", {"general.type": "imatrix"}, [sums])
    with pytest.raises(GgufError, match="importance matrix") as caught:
        read_imatrix(tmp_path / "a.gguf")
    assert "no counts" in str(caught.value)
    write_imatrix(tmp_path / "b.gguf", Imatrix({"w": ImatrixEntry(-values, np.ones(1, np.float32))}))
    with pytest.raises(GgufError, match="importance matrix"):
        read_imatrix(tmp_path / "b.gguf")
