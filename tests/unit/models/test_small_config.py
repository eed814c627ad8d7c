"""Small copies of published configs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from ingle.models.loading.small_config import Size, shrink


@pytest.mark.parametrize("part", [1.0, 0.75])
def test_longrope_has_a_factor_for_each_rotated_pair(part: float) -> None:
    pairs = int(128 * part) // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": part}
    rope |= {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    longest = {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    config = Phi3Config(hidden_size=3072, num_attention_heads=24, rope_parameters=rope, **longest)
    small = shrink(config, Size(width=32, layers=2, vocab_size=64))
    small.pad_token_id = None
    logits = AutoModelForCausalLM.from_config(small)(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
