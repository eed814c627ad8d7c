"""Importance matrices of layers whose columns have another order in a file than in the model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ingle import models
from ingle.gguf.imatrix import read_imatrix
from ingle.quant.imatrix_collector import Importance
from tests.numerics.test_gguf_families import CASES

OUT = "model.layers.0.linear_attn.out_proj.weight"


def test_columns_of_an_importance_matrix_are_those_of_the_file(tmp_path: Path) -> None:
    model_type, settings = CASES["qwen3_5"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    sums = torch.arange(1.0, 4 * 32 + 1, dtype=torch.float64)
    models.save_importance(model, {OUT: Importance(sums, 2)}, tmp_path / "m.gguf", datasets=[], chunk_size=1)
    (entry,) = read_imatrix(tmp_path / "m.gguf").entries.values()
    # llama.cpp's converter orders the value heads of the 2 key heads alternately.
    expected = sums.view(2, 2, 32).transpose(0, 1).flatten() / 2
    assert torch.equal(torch.from_numpy(entry.mean[0]), expected.float())
    assert torch.equal(models.load_importance(model, tmp_path / "m.gguf")[OUT], sums.float() / 2)
    by_tensor = models.importance_by_tensor(model, {OUT: sums.float() / 2})
    assert torch.equal(by_tensor["blk.0.ssm_out.weight"], expected.float())
