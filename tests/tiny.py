"""Models of a few thousand weights, made, written and trained the way several tests need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from ingle.models.loading.meta_device import build

#: Model types that GGUF stores parameter by parameter, under other names.
PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite")

#: Of a config of the Llama family.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_random(config: PretrainedConfig, dtype: torch.dtype, *, std: float = 0.1) -> Any:
    """A model of Ingle's with normal weights around zero, those of norms around one; always the same ones."""
    model: Any = build(config, dtype).to_empty(device="cpu")
    model.tie_weights()
    if hasattr(model.base_model, "rotary_emb"):
        model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ("norm" in path))
    return model


def write_llama(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A random Llama in the hub's layout, with its tokenizer; ``options`` are of its config."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    numbers = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**(sizes | numbers | options))).to(dtype).save_pretrained(folder)
    return folder


def take_steps(model: nn.Module, x: Tensor, target: Tensor, *, lr: float, num_steps: int) -> list[float]:
    """Steps of AdamW on what is trainable, towards ``target``; the loss before each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(num_steps):
        loss = functional.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
