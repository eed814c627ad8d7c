"""Training on a downloaded file in formats that nothing is packed in: IQ1 to IQ3, MXFP4 and NVFP4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ingle import flow, inference
from ingle.config import load_run
from ingle.errors import ConfigError
from ingle.export import export
from ingle.gguf import read_gguf, write_gguf
from ingle.gguf.writer import TensorToWrite
from ingle.quant.ggml import GGUF_FORMATS, GgmlBlocks

MAPS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
TYPES = dict(zip(MAPS, ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m"], strict=True))
SECOND = dict(zip(MAPS, ["mxfp4", "nvfp4"] * 3 + ["mxfp4"], strict=True))


def draw(format: GgmlBlocks, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Random blocks of ordinary size, as rows."""
    count = shape[0] * shape[1] // format.block_size
    blocks = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (50_000, format.base.block_bytes), dtype=np.uint8)
    )
    largest = format.dequantize_blocks(blocks.unsqueeze(0)).squeeze(0).abs().amax(-1)
    chosen = blocks[(largest > 1e-3) & (largest < 0.2)]
    return chosen[torch.arange(count) % len(chosen)].reshape(shape[0], -1).numpy()


@pytest.fixture
def file(tiny_model: Path, tmp_path: Path, gguf_of: Callable[[Path, Path, str], Path]) -> Path:
    """Two layers whose linear maps are held in nine types."""
    folder = tmp_path / "wide"
    shutil.copytree(tiny_model, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_key_value_heads=2, vocab_size=len(tokenizer))).save_pretrained(
        folder
    )
    plain = read_gguf(gguf_of(folder, tmp_path / "plain.gguf", "f16"))
    formats = {member().name: member() for member in GGUF_FORMATS}
    tensors = []
    for tensor in plain.tensors.values():
        parts = tensor.name.split(".")
        kind = {"0": TYPES, "1": SECOND}[parts[1]].get(parts[2]) if parts[0] == "blk" else None
        data = tensor.read if kind is None else lambda f=formats[kind], s=tensor.shape: draw(f, s)
        tensors.append(TensorToWrite(tensor.name, kind or tensor.type_name, tensor.shape, data))
    path = tmp_path / "read.gguf"
    write_gguf(path, plain.metadata, tensors)
    return path


def test_a_run_trains_on_the_bytes_of_the_file(config: Path, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    overrides = [f"--model.id={file}", "--base.format=none", "--evaluate=null"]
    report = flow.finetune(load_run(config, overrides).run)
    assert file.read_bytes() == before
    packed = {row["format"] for row in report.audit["classes"] if row["quantized"]}
    assert packed == {*TYPES.values(), *SECOND.values()}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.2
    model = inference.open_model(str(tmp_path / "run")).model
    held = model.get_submodule("model.layers.0.mlp.up_proj")
    rows = torch.from_numpy(read_gguf(file).tensors["blk.0.ffn_up.weight"].read())
    assert torch.equal(getattr(held, "base", held).get_parameter("data"), rows)
    with pytest.raises(ConfigError, match="only read") as caught:
        export(str(tmp_path / "run"), "gguf", tmp_path / "served")
    assert "--to gguf-adapter" in str(caught.value) and not (tmp_path / "served").exists()
    assert export(str(file), "gguf", tmp_path / "copy.gguf").fidelity.tensors == ()
