"""Tiny random checkpoints of many architectures, written by transformers in the layout of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from ingle.config import ModelConfig
from ingle.models import ModelTask
from ingle.models.kinds import new_model

VOCAB_SIZE = 96

#: Widths are multiples of 64, so that bitsandbytes' blocks fill rows.
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_MOE = {
    **_GROUPED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "llama-tied": lambda: hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: hf.MistralConfig(**_GROUPED, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma": lambda: hf.GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=4),
    "phi3": lambda: hf.Phi3Config(**_GROUPED, sliding_window=5),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_COMMON),
    "falcon": lambda: hf.FalconConfig(**_COMMON, num_kv_heads=2, new_decoder_architecture=True),
    "olmo": lambda: hf.OlmoConfig(**_GROUPED, clip_qkv=1.0),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "cohere": lambda: hf.CohereConfig(**_GROUPED, logit_scale=0.3),
    "granite": lambda: hf.GraniteConfig(**_GROUPED, logits_scaling=4.0, embedding_multiplier=3.0),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**_MOE),
    "qwen2_moe-window": lambda: hf.Qwen2MoeConfig(
        **_MOE, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_MOE, head_dim=16),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **_COMMON,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=8,
        qk_nope_head_dim=24,
        v_head_dim=16,
        first_k_dense_replace=1,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A tiny model on disk."""

    name: str
    folder: Path

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(id=str(self.folder), dtype="float32")

    def reference(self) -> PreTrainedModel:
        """The model as transformers loads it."""
        model = hf.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
        return model.eval()


def randomized(config: hf.PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, including norms and biases."""
    model = new_model(config, ModelTask(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + noise * 0.2)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            randomized(CONFIGS[name]()).save_pretrained(folder)
            made[name] = Checkpoint(name, folder)
        return made[name]

    return make


@pytest.fixture(params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    return make_checkpoint(request.param)


@pytest.fixture
def documents() -> list[list[int]]:
    """Three documents of different lengths, longer than the sliding windows above."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (9, 1, 14)]


@pytest.fixture(scope="session")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token for each word ``t3``, ``t4``, ...; token 2 ends a text."""
    names = ["<pad>", "<s>", "</s>", *(f"t{index} " for index in range(3, VOCAB_SIZE))]
    backend = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<pad>"))
    backend.decoder = Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
