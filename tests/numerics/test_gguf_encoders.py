"""Compares GGUF files of encoders and encoder-decoders with transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import normalizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MT5Config,
    NomicBertConfig,
    NomicBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.export import quantize
from ingle.export.verify.llama_cpp import _without_repacking
from ingle.gguf import read_gguf
from ingle.models import ModelTask, load_model, load_tokenizer
from tests import tiny_tokenizers

TEXTS = ("The quick brown fox jumps!", "john Smith's café, unknown 你 zzz 99", "a film of great beauty; was it good?")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
T5_SIZES = {"d_model": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96}


def publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """Gives a model clear weights and saves it with its tokenizer."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@contextmanager
def opened(llama_cpp: Any, path: Path, **options: Any) -> Iterator[Any]:
    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), 64) | {"n_threads": 1, "verbose": False}
    engine = _without_repacking(llama_cpp.Llama)(str(path), **sizes, **options)
    try:
        yield engine
    finally:
        engine.close()


def require_equal_tokens(path: Path, own: PreTrainedTokenizerFast, engine: Any) -> None:
    read = load_tokenizer(ModelConfig(id=str(path)))
    for text in TEXTS:
        expected = own(text)["input_ids"]
        assert read(text)["input_ids"] == expected
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == expected
    assert read(TEXTS[0], TEXTS[2])["input_ids"] == own(TEXTS[0], TEXTS[2])["input_ids"]


def bert(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)
    return publish(BertForMaskedLM(config), tokenizer, folder)


def nomic(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    config = NomicBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, head_dim=16, **SIZES)
    model = publish(NomicBertForMaskedLM(config), tokenizer, folder)
    # transformers writes fused projections, from which no GGUF file can be made yet.
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return model


def modern(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos", "eos")}
    rope = {"full_attention": 160000.0, "sliding_attention": 10000.0}
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        local_attention=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()},
        **SIZES,
        **ids,
    )
    return publish(ModernBertForMaskedLM(config), tokenizer, folder)


def byte_level() -> PreTrainedTokenizerFast:
    """ModernBERT's kind of tokenizer: byte-level BPE with one token before and one after each text."""
    tokenizer = tiny_tokenizers.roberta()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "make_tokenizer"),
    [(bert, tiny_tokenizers.bert), (nomic, tiny_tokenizers.bert), (modern, byte_level)],
    ids=["bert", "nomic-bert", "modern-bert"],
)
def test_an_encoder_and_its_tokenizer_are_the_same_in_a_file(
    make: Callable[[Path, PreTrainedTokenizerFast], Any],
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
    tmp_path: Path,
    llama_cpp: Any,
) -> None:
    tokenizer, path = make_tokenizer(), tmp_path / "model.gguf"
    model = make(tmp_path / "published", tokenizer)
    quantize(str(tmp_path / "published"), "f32", path)
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        expected = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    with opened(llama_cpp, path, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE) as engine:
        require_equal_tokens(path, tokenizer, engine)
        theirs = torch.tensor(engine.embed(TEXTS[0], normalize=False))
    # llama.cpp approximates the error function in GELU.
    assert ((theirs - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 2e-3
    read = load_model(ModelConfig(id=str(path), dtype="float32"), task=ModelTask("tag", ("a", "b")))
    own = model.base_model.state_dict()
    for name, value in read.base_model.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=0, msg=name)


def test_masked_tokens_are_refused_because_the_head_is_missing(tmp_path: Path) -> None:
    bert(tmp_path / "published", tiny_tokenizers.bert())
    quantize(str(tmp_path / "published"), "q8_0", tmp_path / "model.gguf")
    assert not any("cls" in name for name in read_gguf(tmp_path / "model.gguf").tensors)
    with pytest.raises(ModelError, match="no head that predicts masked tokens"):
        load_model(ModelConfig(id=str(tmp_path / "model.gguf")))


def test_a_cased_tokenizer_is_the_same_in_a_file(tmp_path: Path, llama_cpp: Any) -> None:
    cased = tiny_tokenizers.bert()
    cased.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    bert(tmp_path / "published", cased)
    quantize(str(tmp_path / "published"), "f32", tmp_path / "model.gguf")
    with opened(llama_cpp, tmp_path / "model.gguf", vocab_only=True) as engine:
        require_equal_tokens(tmp_path / "model.gguf", cased, engine)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizers.t5()
    tokenizer.backend_tokenizer.normalizer = None  # llama.cpp knows tables of characters, but not NFKC by name
    return tokenizer


def run_batch(llama_cpp: Any, run: Callable[[Any, Any], int], engine: Any, ids: list[int]) -> None:
    """Runs one sequence, with an output for each token."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    assert run(engine.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)


def pair_logits(llama_cpp: Any, engine: Any, source: list[int], target: list[int]) -> Tensor:
    """llama.cpp's logits ``[T, V]`` of the decoder."""
    run_batch(llama_cpp, llama_cpp.llama_encode, engine, source)
    run_batch(llama_cpp, llama_cpp.llama_decode, engine, target)
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(engine.ctx), shape=(len(target) * engine.n_vocab(),))
    return torch.tensor(found.reshape(len(target), -1))


@pytest.mark.parametrize(
    "make",
    [
        lambda size: T5Config(**T5_SIZES, vocab_size=size),
        lambda size: T5Config(**T5_SIZES, vocab_size=size, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        lambda size: MT5Config(**T5_SIZES, vocab_size=size, tie_word_embeddings=False),
    ],
    ids=["t5", "t5 v1.1", "mt5"],
)
def test_an_encoder_decoder_is_the_same_in_a_file(make: Callable[[int], Any], tmp_path: Path, llama_cpp: Any) -> None:
    tokenizer, path = unigram(), tmp_path / "model.gguf"
    config = make(len(tokenizer))
    config.decoder_start_token_id = config.pad_token_id = 0
    model: Any = AutoModelForSeq2SeqLM.from_config(config)
    if not getattr(config, "scale_decoder_outputs", False):  # only the first T5 has a tied head
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    publish(model, tokenizer, tmp_path / "published")
    quantize(str(tmp_path / "published"), "f32", path)
    source, target = tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"], [0, 5, 9, 20, 33, 17]
    inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([target])}
    with torch.no_grad():
        expected = model(**inputs).logits[0]
    with opened(llama_cpp, path, logits_all=True) as engine:
        require_equal_tokens(path, tokenizer, engine)
        theirs = pair_logits(llama_cpp, engine, source, target)
    # llama.cpp keeps keys and values in float16.
    assert ((theirs - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-2
    read = load_model(ModelConfig(id=str(path), dtype="float32"))
    own = model.state_dict()
    for name, value in read.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=1e-6, atol=0, msg=name)
    assert read.config.scale_decoder_outputs == getattr(config, "scale_decoder_outputs", False)
