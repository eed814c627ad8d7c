"""A Go template is written only where the model's own template gives the same text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from ingle.export.ollama import FAMILIES, make_modelfile, recognize

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Make = Callable[..., PreTrainedTokenizerFast]


def test_chatml_is_recognised(tokenizer: PreTrainedTokenizerFast) -> None:
    found = recognize(tokenizer)
    assert found is not None and found[0].name == "ChatML" and found[1] is None


def test_llama_3_is_recognised(tokenizer_factory: Make) -> None:
    found = recognize(tokenizer_factory(chat_template=LLAMA3))
    assert found is not None and found[0].name == "Llama 3"
    assert "<|begin_of_text|>" not in found[0].go_template()  # llama.cpp adds it


def test_a_system_message_that_the_template_adds_is_written(tokenizer_factory: Make) -> None:
    tokenizer = tokenizer_factory(chat_template=QWEN)
    text = make_modelfile(tokenizer, [tokenizer.eos_token_id], weights="./m.gguf")
    assert 'SYSTEM """You are a helpful assistant."""' in text


@pytest.mark.parametrize("template", [QWEN.replace("'\n' +", "': ' +"), "{{ raise_exception('no') }}", None])
def test_anything_else_is_left_to_ollama(tokenizer_factory: Make, template: str | None) -> None:
    tokenizer = tokenizer_factory(chat_template=template)
    assert recognize(tokenizer) is None
    assert "TEMPLATE" not in make_modelfile(tokenizer, [1], weights="./m.gguf").replace("No TEMPLATE", "")


def test_the_go_template_spells_the_turn() -> None:
    assert FAMILIES[0].go_template() == (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )


def test_a_modelfile_names_weights_adapter_and_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    lines = make_modelfile(tokenizer, [end], weights="./base.gguf", adapter="./lora.gguf").splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./lora.gguf"]
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
