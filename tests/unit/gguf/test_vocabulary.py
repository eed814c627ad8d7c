"""Tests the conversion of tokenizers to GGUF metadata and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ingle.errors import GgufError
from ingle.gguf import write_gguf
from ingle.gguf.pretokenizers import GPT4O, LLAMA3, QWEN2, QWEN35, TEKKEN, byte_level, find_pre
from ingle.gguf.vocabulary import Vocabulary, to_metadata, to_vocabulary

EMBER = Path(__file__).parents[3] / "examples/models/ember-6m"
TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello  world\n\n\n \t\t x",
    "I've 'told you: we'LL see 3 33 333 3333.5",
    "naïve café — 我想在 apple 工作 🦙🦙 \u200d",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|><|pad|>b <|im_end|",
    "def f(x):\n    return x**2  # été\r\n",
    "\x00\x7f",
]


def ember() -> dict[str, Any]:
    return json.loads((EMBER / "tokenizer.json").read_text())


def metadata(tokenizer: dict[str, Any], **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": 4096,
        "special": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
        "end_token_ids": [3, 0],
        "chat_template": "a template",
    }
    return to_metadata(tokenizer, **{**settings, **options})


def ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return Tokenizer.from_str(json.dumps(vocabulary.tokenizer)).encode(text).ids


def test_the_bundled_tokenizer_comes_back() -> None:
    values = metadata(ember())
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    vocabulary = to_vocabulary(values)
    original = Tokenizer.from_file(str(EMBER / "tokenizer.json"))
    read = Tokenizer.from_str(json.dumps(vocabulary.tokenizer))
    for text in TEXTS:
        expected = original.encode(text)
        assert read.encode(text).ids == expected.ids and read.encode(text).offsets == expected.offsets, text
        for skip in (True, False):
            decoded = original.decode(expected.ids, skip_special_tokens=skip)
            assert read.decode(expected.ids, skip_special_tokens=skip) == decoded
    assert vocabulary.special == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    assert vocabulary.end_token_ids == [3, 0] and vocabulary.chat_template == "a template"


def test_the_first_token_is_put_before_texts_when_the_tokenizer_does_it() -> None:
    tokenizer = ember()
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    values = metadata(tokenizer)
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert ids(to_vocabulary(values), "Hi")[0] == 0
    del values["tokenizer.ggml.add_bos_token"]
    assert ids(to_vocabulary(values), "Hi")[0] != 0  # llama.cpp's default for this kind


def test_rows_without_a_token_are_filled_up_and_left_out_again() -> None:
    values = metadata(ember(), vocab_size=4100)
    assert values["tokenizer.ggml.tokens"][4096:] == [f"[PAD{number}]" for number in range(4096, 4100)]
    assert to_vocabulary(values).tokenizer["model"]["vocab"] == ember()["model"]["vocab"]


def test_ends_that_llama_cpp_knows_by_text_take_no_key() -> None:
    tokenizer = ember()
    values = metadata(tokenizer)
    assert values["tokenizer.ggml.eos_token_id"] == 3 and "tokenizer.ggml.eot_token_id" not in values
    values = metadata(tokenizer, end_token_ids=[3, 2, 1])
    assert (values["tokenizer.ggml.eot_token_id"], values["tokenizer.ggml.eom_token_id"]) == (2, 1)
    assert to_vocabulary(values).end_token_ids == [3, 2, 1, 0]
    with pytest.raises(GgufError, match="4 tokens end an answer"):
        metadata(tokenizer, end_token_ids=[3, 2, 1, 100])


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(LLAMA3, "llama-bpe"), (QWEN2, "qwen2"), (QWEN35, "qwen35"), (TEKKEN, "tekken"), (GPT4O, "gpt-4o")],
)
def test_ways_of_cutting_have_names(pattern: str, name: str) -> None:
    cut = byte_level(name)
    assert cut["pretokenizers"][0]["pattern"]["Regex"] == pattern
    assert find_pre({"pre_tokenizer": cut, "normalizer": {"type": "NFC"}}) == name
    assert find_pre({"pre_tokenizer": byte_level("smollm")}) == "smollm"


def test_a_way_of_cutting_without_a_name_is_refused() -> None:
    tokenizer = ember()
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    with pytest.raises(GgufError, match="pre-tokenizer of this model"):
        metadata(tokenizer)
    with pytest.raises(GgufError, match="'jais-2'"):
        to_vocabulary(metadata(ember()) | {"tokenizer.ggml.pre": "jais-2"})


def test_llama_cpp_cuts_the_same_way(llama_cpp: Any, tmp_path: Path) -> None:
    texts = [
        "it's I'LL 1234567",
        "cafe\u0301 _\u0301j \u0939\u093f",
        "A/B//c\n/ d",
        "HelloFOOBar  \n y",
        "   x\r\n\r\nz",
    ]
    for name in ("qwen35", "lfm2", "granite-docling", "olmo", "glm4", "command-r", "stablelm2", "bloom", "seed-coder"):
        values = metadata(ember()) | {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}
        write_gguf(tmp_path / "vocabulary.gguf", header() | values, [])
        model = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
        for text in texts:
            ours, theirs = ids(to_vocabulary(values), text), model.tokenize(text.encode(), add_bos=False, special=True)
            assert ours == theirs, (name, text)


def header() -> dict[str, Any]:
    """The metadata of a model that llama.cpp needs to read a vocabulary."""
    shape = {"block_count": 1, "context_length": 8, "embedding_length": 4, "feed_forward_length": 4}
    shape |= {"attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    return {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in shape.items()}


def pieces() -> dict[str, Any]:
    """A sentencepiece vocabulary in which the order of scores matters."""
    words = ["▁h", "he", "lo", "▁he", "el", "l", "▁", "llo", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "ello"]
    letters = sorted(set("helowrd▁abcx") - {"l", "▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters, "<|tool|>"]
    scores = [0.0] * 259 + [-float(number) for number in range(len(words))] + [-100.0] * len(letters) + [0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters)) + [4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def text_of(values: dict[str, Any], numbers: list[int]) -> list[str]:
    return [values["tokenizer.ggml.tokens"][number] for number in numbers]


def test_sentencepiece_joins_the_best_score_first() -> None:
    values = pieces()
    vocabulary = to_vocabulary(values)
    assert text_of(values, ids(vocabulary, "hello world")) == ["<s>", "▁hello", "▁world"]
    assert text_of(values, ids(vocabulary, "é x<|tool|>")) == ["<s>", "▁", "<0xC3>", "<0xA9>", "▁", "x", "<|tool|>"]
    decoded = Tokenizer.from_str(json.dumps(vocabulary.tokenizer)).decode(ids(vocabulary, "hello é"))
    assert decoded == "hello é"
    values["tokenizer.ggml.add_space_prefix"] = False
    assert text_of(values, ids(to_vocabulary(values), "hello")) == ["<s>", "he", "llo"]
    values["tokenizer.ggml.scores"][values["tokenizer.ggml.tokens"].index("el")] = 5.0
    assert text_of(values, ids(to_vocabulary(values), "hello")) == ["<s>", "h", "ello"]


def test_sentencepiece_cuts_as_llama_cpp_does(llama_cpp: Any, tmp_path: Path) -> None:
    values = pieces()
    for prefix in (True, False):
        values["tokenizer.ggml.add_space_prefix"] = prefix
        write_gguf(tmp_path / "vocabulary.gguf", header() | values, [])
        model = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
        vocabulary = to_vocabulary(values)
        for text in ("hello world", "helloworld hell low", "é x<|tool|>", "x <|tool|> hello", "  hello  "):
            assert ids(vocabulary, text) == model.tokenize(text.encode(), add_bos=True, special=True), (prefix, text)


def test_sentencepiece_with_merges_cuts_as_llama_cpp_does(llama_cpp: Any, tmp_path: Path) -> None:
    values = pieces() | {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.pre": "gemma4"}
    del values["tokenizer.ggml.scores"]
    values["tokenizer.ggml.merges"] = ["h e", "▁ h", "l o", "▁ he", "l lo", "▁he llo", "▁ w", "o r", "▁w or", "l d"]
    write_gguf(tmp_path / "vocabulary.gguf", header() | values, [])
    model = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    vocabulary = to_vocabulary(values)
    for text in (" hello world", "helloworld hell low", "é x<|tool|>", "x\n\nhello\n he", "  hello  "):
        assert ids(vocabulary, text) == model.tokenize(text.encode(), add_bos=True, special=True), text
    assert text_of(values, ids(vocabulary, " hello")) == ["<s>", "▁hello"]


def test_sentencepiece_comes_back() -> None:
    values = pieces()
    vocabulary = to_vocabulary(values)
    tokens = values["tokenizer.ggml.tokens"]
    again = to_metadata(
        copy.deepcopy(vocabulary.tokenizer),
        vocab_size=len(tokens),
        special=vocabulary.special,
        end_token_ids=vocabulary.end_token_ids,
        chat_template=None,
    )
    assert again["tokenizer.ggml.model"] == "llama" and again["tokenizer.ggml.add_bos_token"] is True
    for key in ("tokens", "token_type"):
        assert again[f"tokenizer.ggml.{key}"] == values[f"tokenizer.ggml.{key}"]
    for text in ("hello world", "helloworld hell low", "é x<|tool|>"):
        assert ids(to_vocabulary(again), text) == ids(vocabulary, text)


def test_what_is_no_known_tokenizer_is_refused() -> None:
    with pytest.raises(GgufError, match="contains no tokenizer"):
        to_vocabulary({})
    with pytest.raises(GgufError, match="kind 'rwkv'"):
        to_vocabulary({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(GgufError, match="kind WordLevel"):
        metadata({"model": {"type": "WordLevel"}})
