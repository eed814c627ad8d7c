"""Compares the type of every tensor with llama.cpp's quantizer, if it is installed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingle.errors import GgufError
from ingle.gguf import TensorToWrite, read_gguf, write_gguf
from ingle.gguf.mixes import FILE_TYPES, Mix, file_type_number, is_quantized, mix_of

MODELS = {
    "llama, 4 layers, tied": ("llama", 4, 4, 4, True, 256),
    "llama, 32 layers, grouped": ("llama", 32, 8, 2, False, 256),
    "llama, 80 layers, grouped": ("llama", 80, 8, 1, False, 256),
    "llama, 80 layers": ("llama", 80, 2, 2, False, 256),
    "qwen2, 80 layers": ("qwen2", 80, 8, 8, False, 256),
    "qwen3, 28 layers, tied": ("qwen3", 28, 8, 4, True, 256),
    "gemma2, 26 layers": ("gemma2", 26, 8, 4, True, 256),
    "llama, rows of 96": ("llama", 17, 4, 4, False, 96),
    "llama, rows of 80": ("llama", 3, 4, 1, True, 80),
    "mixtral": ("llama", 32, 8, 2, False, 256),
    "qwen3moe, rows of 96": ("qwen3moe", 24, 8, 1, False, 96),
    "qwen3next": ("qwen3next", 24, 8, 2, False, 256),
    "granitehybrid": ("granitehybrid", 20, 8, 2, True, 256),
    "lfm2": ("lfm2", 17, 8, 1, True, 256),
    "mamba": ("mamba", 24, 0, 0, True, 256),
    "nemotron_h": ("nemotron_h", 24, 8, 2, False, 256),
}
#: Metadata that the architectures above need; one of them has eight experts.
FURTHER: dict[str, dict[str, Any]] = {
    "mixtral": {"expert_count": 8, "expert_used_count": 2},
    "qwen3moe": {"expert_count": 16, "expert_used_count": 2, "expert_feed_forward_length": 256},
    "qwen3next": {"expert_count": 8, "expert_used_count": 2, "rope.dimension_count": 8},
    "granitehybrid": {"attention.head_count_kv": [2 if layer % 5 == 3 else 0 for layer in range(20)]},
    "nemotron_h": {
        "attention.head_count_kv": [2 if layer % 3 == 0 else 0 for layer in range(24)],
        "feed_forward_length": [256 if layer % 3 == 1 else 0 for layer in range(24)],
        "attention.layer_norm_epsilon": 1e-5,
    },
    "lfm2": {"attention.head_count_kv": [2 if layer % 3 == 0 else 0 for layer in range(17)], "shortconv.l_cache": 3},
}
_STATE = {"conv_kernel": 4, "state_size": 16, "group_count": 1, "inner_size": 512, "time_step_rank": 8}


def metadata(model: str) -> dict[str, Any]:
    architecture, num_layers, num_heads, num_kv_heads, *_ = MODELS[model]
    values: dict[str, Any] = {
        "block_count": num_layers,
        "context_length": 32,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": num_heads,
        "attention.head_count_kv": num_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 8,
        "vocab_size": 4,
    }
    values |= {f"ssm.{key}": size for key, size in _STATE.items()}
    values |= FURTHER.get(model.partition(",")[0], {})
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items()}


def parts_of(model: str, layer: int, values: dict[str, Any]) -> list[str]:
    """The matrices of a layer."""
    architecture = MODELS[model][0]
    if architecture == "nemotron_h":
        return (["attn_q", "attn_k", "attn_v", "attn_output"], ["ffn_up", "ffn_down"], ["ssm_in", "ssm_out"])[layer % 3]
    kv_heads = values[f"{architecture}.attention.head_count_kv"]
    if architecture == "mamba" or (isinstance(kv_heads, list) and not kv_heads[layer]):
        mixer = (
            ["shortconv.in_proj", "shortconv.out_proj"] if architecture == "lfm2" else ["ssm_in", "ssm_x", "ssm_out"]
        )
    elif architecture == "qwen3next" and layer % 4 != 3:
        mixer = ["attn_qkv", "attn_gate", "ssm_ba", "ssm_out"]
    else:
        mixer = ["attn_q", "attn_k", "attn_v", "attn_output"]
    if values.get(f"{architecture}.expert_count"):
        shared = ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"] if architecture == "qwen3next" else []
        return [*mixer, "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", *shared]
    return mixer if architecture == "mamba" else [*mixer, "ffn_gate", "ffn_up", "ffn_down"]


def tensors(model: str, values: dict[str, Any]) -> list[TensorToWrite]:
    """A few rows of every kind: types depend on names, layers and row lengths only."""
    _, num_layers, _, _, tied, columns = MODELS[model]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (4, columns), "output_norm.weight": (columns,)}
    if not tied:
        shapes["output.weight"] = (4, columns)
    for layer in range(num_layers):
        for part in parts_of(model, layer, values):
            shapes[f"blk.{layer}.{part}.weight"] = (2, 2, columns) if part.endswith("_exps") else (2, columns)
        shapes[f"blk.{layer}.attn_norm.weight"] = (columns,)
        shapes[f"blk.{layer}.attn_q.bias"] = (columns,)
    rng = np.random.default_rng(0)
    return [
        TensorToWrite(name, "f32", shape, lambda shape=shape: rng.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("has_imatrix", [False, True], ids=["plain", "imatrix"])
def test_types_are_those_of_llama_cpp(model: str, has_imatrix: bool, llama_cpp: Any, tmp_path: Path) -> None:
    *_, tied, columns = MODELS[model]
    values = metadata(model)
    source = tmp_path / "source.gguf"
    write_gguf(source, values, tensors(model, values))
    importance = (ctypes.c_float * columns)(*([1.0] * columns))
    entries = (llama_cpp.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].data, entries[0].size = b"blk.0.attn_q.weight", importance, columns
    for file_type in FILE_TYPES:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type_number(file_type), 1
        if has_imatrix:
            params.imatrix = entries
        out = tmp_path / f"{file_type}.gguf"
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
        assert code == 0
        mix = mix_of(file_type, values, tied=tied, has_imatrix=has_imatrix)
        file = read_gguf(out)
        chosen = {name: mix.tensor_type(name, tensor.shape) for name, tensor in file.tensors.items()}
        assert chosen == {name: tensor.type_name for name, tensor in file.tensors.items()}, file_type
        assert file.metadata["general.file_type"] == file_type_number(file_type)
        out.unlink()


#: From llama.cpp's table: file type; attn_v and ffn_down of layers 0, 1, 3, 5, 31 of 32; attn_output; head.
WRITTEN_DOWN = [
    ("q2_k", "q3_k q3_k q3_k q3_k q3_k", "q3_k q3_k q3_k q3_k q3_k", "q3_k", "q6_k"),
    ("q3_k_s", "q3_k q3_k q3_k q3_k q3_k", "q3_k q3_k q3_k q3_k q3_k", "q3_k", "q6_k"),
    ("q3_k_m", "q5_k q5_k q4_k q4_k q4_k", "q5_k q5_k q4_k q4_k q4_k", "q4_k", "q6_k"),
    ("q3_k_l", "q5_k q5_k q5_k q5_k q5_k", "q5_k q5_k q5_k q5_k q5_k", "q5_k", "q6_k"),
    ("q4_k_s", "q5_k q5_k q5_k q4_k q4_k", "q5_k q5_k q5_k q4_k q4_k", "q4_k", "q6_k"),
    ("q4_k_m", "q6_k q6_k q6_k q4_k q6_k", "q6_k q6_k q6_k q4_k q6_k", "q4_k", "q6_k"),
    ("q5_k_s", "q5_k q5_k q5_k q5_k q5_k", "q5_k q5_k q5_k q5_k q5_k", "q5_k", "q6_k"),
    ("q5_k_m", "q6_k q6_k q6_k q5_k q6_k", "q6_k q6_k q6_k q5_k q6_k", "q5_k", "q6_k"),
    ("q6_k", "q6_k q6_k q6_k q6_k q6_k", "q6_k q6_k q6_k q6_k q6_k", "q6_k", "q6_k"),
    ("q4_0", "q4_0 q4_0 q4_0 q4_0 q4_0", "q4_0 q4_0 q4_0 q4_0 q4_0", "q4_0", "q6_k"),
    ("q8_0", "q8_0 q8_0 q8_0 q8_0 q8_0", "q8_0 q8_0 q8_0 q8_0 q8_0", "q8_0", "q8_0"),
]


@pytest.mark.parametrize(("file_type", "values", "down", "output", "head"), WRITTEN_DOWN)
def test_types_are_those_written_down(file_type: str, values: str, down: str, output: str, head: str) -> None:
    mix = Mix(file_type, "llama", 32, 32, 32, tied=True)
    layers, shape = (0, 1, 3, 5, 31), (4096, 4096)
    assert " ".join(mix.tensor_type(f"blk.{layer}.attn_v.weight", shape) for layer in layers) == values
    assert " ".join(mix.tensor_type(f"blk.{layer}.ffn_down.weight", shape) for layer in layers) == down
    assert mix.tensor_type("blk.9.attn_output.weight", shape) == output
    assert mix.tensor_type("blk.9.attn_q.weight", shape) == FILE_TYPES[file_type]
    assert mix.tensor_type("token_embd.weight", shape) == head


def test_norms_biases_and_routers_stay() -> None:
    assert not is_quantized("blk.0.attn_norm.weight", (8, 256)) and not is_quantized("blk.0.attn_q.bias", (256,))
    assert not is_quantized("blk.0.ffn_gate_inp.weight", (8, 256)) and not is_quantized("x.weight", (1, 256))
    mix = Mix("q4_k_m", "llama", 8, 8, 8, tied=False)
    assert mix.tensor_type("output_norm.weight", (256,)) == "f32"


def test_an_unknown_file_type_is_told() -> None:
    with pytest.raises(GgufError, match="cannot write the file type 'q9_k'"):
        Mix("q9_k", "llama", 8, 8, 8, tied=False)
