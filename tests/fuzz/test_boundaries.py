"""Readers of single files against references and the rules of their formats, with fixed inputs from hypothesis."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from transformers import AutoConfig, AutoModelForCausalLM

from ingle.config.loader import load_run
from ingle.data.readers import read_rows
from ingle.errors import ConfigError, DataError, GgufError, ModelError
from ingle.gguf import TensorToWrite, read_gguf, write_gguf
from ingle.gguf.architecture import to_metadata
from ingle.gguf.imatrix import read_imatrix
from ingle.gguf.names import names_of
from ingle.models.loading.gguf_model import read_gguf_config
from ingle.models.loading.safetensors_files import read_index
from tests.fuzz import ggufs
from tests.numerics.test_gguf_families import CASES

_FIXED = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
#: Families with metadata by layer, with divisors of frequencies, or with names of their own.
QUICK = ("gemma4_moe", "phi3", "nemotron_h_moe", "gpt2", "qwen3_5")
_SIZES = {"F32": 4, "U8": 1, "I64": 8, "BF16": 2}

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _text)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3), max_leaves=8
)


def accepted(raw: bytes, name: str, read: Any, refused: type[Exception]) -> Any:
    """Returns what a reader returns for a file with these bytes; None if it refuses the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        try:
            return read(path)
        except refused:
            return None


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Files with valid headers or one error, and with the right number of data bytes, more or fewer."""
    header: dict[str, Any] = {}
    end = 0
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(_SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + _SIZES[dtype] * math.prod(shape)
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if header and draw(st.booleans()):
        entry = header[draw(st.sampled_from(sorted(header)))]
        key = draw(st.sampled_from(["shape", "data_offsets"]))
        entry[key] = draw(st.lists(st.integers(-1, 9) | st.sampled_from([2**62, 2**64, 1.0]), max_size=3) | _json)
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(_text, _text, max_size=2) | _json)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(max(0, end + draw(st.sampled_from([0, 0, 0, -1, 1, 8]))))


@given(safetensors_files())
@_FIXED
def test_a_safetensors_file_is_taken_where_the_library_takes_it(raw: bytes) -> None:
    def read(path: Path) -> dict[str, Any]:
        return {name: (list(t.shape), t.num_bytes) for name, t in read_index(path.parent).items()}

    try:
        theirs = {name: (entry["shape"], len(entry["data"])) for name, entry in deserialize(raw)}
    except SafetensorError:
        theirs = None
    assert accepted(raw, "model.safetensors", read, ModelError) == theirs


@pytest.mark.parametrize("key", ["w", "__metadata__"])
def test_a_safetensors_header_names_nothing_twice(key: str) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} if key == "w" else {}
    raw = f"{{{json.dumps(key)}: {json.dumps(entry)}, {json.dumps(key)}: {json.dumps(entry)}}}".encode()
    raw = struct.pack("<Q", len(raw)) + raw + b"\0"
    assert accepted(raw, "model.safetensors", lambda path: read_index(path.parent), ModelError) is None


@st.composite
def gguf_files(draw: st.DrawFn) -> ggufs.Gguf:
    """Float tensors one after the other, and at times one number that is wrong."""
    file = ggufs.Gguf([ggufs.Value(b"general.architecture", 8, b"llama")])
    end = 0
    for number in range(draw(st.integers(0, 3))):
        sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        file.entries.append(ggufs.Entry(f"t{number}".encode(), sizes, 0, end))
        end += -(-4 * math.prod(sizes) // 32) * 32
    file.data = bytes(end)
    if file.entries and draw(st.booleans()):
        entry = draw(st.sampled_from(file.entries))
        match draw(st.integers(0, 3)):
            case 0:
                entry.offset = draw(st.sampled_from([0, 1, 32, 64, 2**63, 2**64 - 32]))
            case 1:
                entry.sizes[0] = draw(st.sampled_from([0, 1, 10, 2**32, 2**64 - 1]))
            case 2:
                entry.name = draw(st.sampled_from([b"t0", b"\xff", b""]))
            case _:
                file.data = file.data[: draw(st.integers(0, end))]
    return file


@given(gguf_files())
@_FIXED
def test_a_gguf_file_is_taken_where_its_tensors_lie_one_after_the_other(file: ggufs.Gguf) -> None:
    end, right, last = 0, True, 0
    for entry in file.entries:
        right &= entry.offset == end and 0 not in entry.sizes and entry.name != b"\xff"
        last = end + 4 * math.prod(entry.sizes)
        end = -(-last // 32) * 32
    right &= last <= len(file.data) and len({entry.name for entry in file.entries}) == len(file.entries)
    found = accepted(ggufs.dump(file), "x.gguf", read_gguf, GgufError)
    assert (found is not None) == right
    if found is not None:
        shapes = {name.encode(): list(tensor.shape)[::-1] for name, tensor in found.tensors.items()}
        assert shapes == {entry.name: entry.sizes for entry in file.entries}


def family_header(case: str, path: Path) -> bytes:
    """A file of a family with zeros as weights and without a tokenizer."""
    model_type, settings = CASES[case]
    sizes = {key: 32 for key in ("vocab_size", "vocab_size_per_layer_input") if key in settings}
    config = AutoConfig.for_model(model_type, **settings | sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names, tensors = names_of(config.to_dict()), []
    for target, value in model.state_dict().items():
        rule = names.rule(target, tuple(value.shape))
        for name, shape in () if rule is None else zip(rule.tensors, rule.file_shapes, strict=True):
            tensors.append(TensorToWrite(name, "f32", shape, lambda shape=shape: np.zeros(shape, np.float32)))
    write_gguf(path, to_metadata(config.to_dict()), tensors)
    return path.read_bytes()


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.sweep) for case in CASES]
)
def test_the_header_of_a_family_is_read_or_refused(case: str, tmp_path: Path) -> None:
    raw = family_header(case, tmp_path / "whole.gguf")
    assert accepted(raw, "x.gguf", lambda path: read_gguf_config(read_gguf(path)), GgufError) is not None
    for seed in range(60):
        mutated, _ = ggufs.mutate_gguf(raw, Random(seed))
        accepted(mutated, "x.gguf", lambda path: read_gguf_config(read_gguf(path)), GgufError)


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda tail: struct.pack("<i", 1) + tail))
@_FIXED
def test_bytes_are_an_importance_matrix_or_refused(raw: bytes) -> None:
    accepted(raw, "imatrix.dat", read_imatrix, GgufError)


@given(st.lists(_json, max_size=4))
@_FIXED
def test_json_lines_are_read_as_they_were_written(rows: list[Any]) -> None:
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = accepted(raw, "rows.jsonl", lambda path: [row for _, row in read_rows(path)], DataError)
    if rows and all(isinstance(row, dict) for row in rows):
        assert json.dumps(found) == json.dumps(rows)
    else:
        assert found is None


@given(st.dictionaries(st.sampled_from(["seed", "model", "data", "train", "optim", "adapter", "base", "x"]), _json))
@_FIXED
def test_a_config_of_any_values_is_built_or_refused(tree: dict[str, Any]) -> None:
    # JSON is YAML; odd numbers are what differs.
    accepted(json.dumps(tree).encode(), "run.yaml", load_run, ConfigError)


@given(st.lists(_text | st.sampled_from(["--seed", "--seed=1", "--data.sources=a.jsonl", "--model.id=x"]), max_size=4))
@_FIXED
def test_any_words_are_options_or_refused(words: list[str]) -> None:
    try:
        load_run(None, words)
    except ConfigError:
        return
