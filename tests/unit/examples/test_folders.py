"""What ships beside the scripts: configs that decode, the model folder, the tiny data of the how-to."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ingle.config import Run
from ingle.config.rules import check

LABELLED = ("classify/polarity.yaml", "tag/entities.yaml", "answer/people.yaml", "seq2seq/e2e.yaml")
CONFIGS = (
    *("demo/demo.yaml", "own-data/orders.yaml", "quickstart-hub.yaml", *LABELLED),
    *("pretrain/pretrain.yaml", "pretrain/encoder.yaml", "pretrain/encoder-decoder.yaml"),
    *(f"align/{name}.yaml" for name in ("sft", "dpo", "grpo", "ppo", "sums_sft", "sums")),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_decodes_and_its_files_exist(examples: Path, name: str) -> None:
    tree = yaml.safe_load((examples / name).read_text(encoding="utf-8"))
    for section in ("data", "evaluate"):
        if section in tree:
            tree[section]["sources"] = [{"path": s} if isinstance(s, str) else s for s in tree[section]["sources"]]
    run = Run.model_validate(tree)
    check(run)
    sources = [*run.data.sources, *(run.evaluate.sources if run.evaluate else ())]
    for source in sources:
        if not source.path.startswith("examples/pretrain/corpus/"):  # generated, not shipped
            assert (examples.parent / source.path).is_file()
    if run.model.id.startswith("examples/"):
        assert (examples.parent / run.model.id / "config.json").is_file()


def test_model_folder_is_a_small_llama_that_llama_cpp_can_hold(examples: Path) -> None:
    config = AutoConfig.from_pretrained(examples / "models/ember-6m")
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.hidden_size % 256 == config.intermediate_size % 256 == 0  # every block format fits
    attention = config.hidden_size * config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    num_parameters = config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size
    assert num_parameters == 5_770_496
    assert 2 * num_parameters < 12_000_000  # bytes of bf16 weights
    assert config.vocab_size == 4096


@pytest.mark.parametrize(
    ("name", "auto"), [("ember-encoder", AutoModelForMaskedLM), ("ember-encoder-decoder", AutoModelForSeq2SeqLM)]
)
def test_base_of_the_labelled_examples_has_all_weights(examples: Path, name: str, auto: type[Any]) -> None:
    folder = examples / "models" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    model, loading = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[found] for found in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    count = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    assert count in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_examples_start_from_pretrained_weights(examples: Path, name: str) -> None:
    model = yaml.safe_load((examples / name).read_text(encoding="utf-8"))["model"]
    assert "init" not in model and (examples.parent / model["id"] / "model.safetensors").is_file()


def test_tokenizer_holds_every_byte_and_the_chat_template(examples: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(examples / "models/ember-6m")
    assert len(tokenizer) == 4096
    text = "".join(map(chr, range(1, 0x250))) + "日本 🙂 half past three,  two   spaces\n\n\ttab"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    names = (tokenizer.bos_token, tokenizer.pad_token, "<|im_start|>", tokenizer.eos_token)
    assert names == ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(list(names)) == [0, 1, 2, 3]
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]  # no bos of its own
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)


def test_tokenizer_splits_words_as_gpt2_does(examples: Path) -> None:
    spec = json.loads((examples / "models/ember-6m/tokenizer.json").read_text(encoding="utf-8"))
    pre = spec["pre_tokenizer"]
    assert pre["type"] == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"]
    assert spec["model"]["type"] == "BPE" and spec["normalizer"] is None


def test_generation_stops_at_both_ends(examples: Path) -> None:
    settings = json.loads((examples / "models/ember-6m/generation_config.json").read_text())
    assert settings["eos_token_id"] == [3, 0]


def test_orders_are_what_the_script_writes(orders_script: ModuleType, examples: Path, tmp_path: Path) -> None:
    orders_script.main(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (examples / "own-data" / name).read_bytes()
