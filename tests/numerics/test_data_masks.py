"""Masks against an independent oracle: transformers' own, for templates marked with ``{% generation %}``."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ingle.data.encoding import TextEncoder, make_document
from ingle.data.types import Example, Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set head = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set head = bos_token + head %}{% endif %}{{ head }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = ("hello", "world", "user", "assistant", "\n", "  ", "four", "naïve", "日本", "😀", "<b>", "EndMark", "?", "\t")


def make_conversation(rng: random.Random) -> tuple[Message, ...]:
    turns = [Message("system", "Be brief.")] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        for role in ("user", "assistant"):
            # transformers finds no mask for an answer that begins with white space; ours is tested elsewhere
            turns.append(Message(role, " ".join(["ok", *rng.choices(WORDS, k=rng.randint(1, 12)), "."])))
    return tuple(turns)


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_masks_equal_those_of_generation_tags(template, tokenizer_factory):
    tokenizer = tokenizer_factory(special=SPECIAL, bos="<bos>", chat_template=template, add_bos=True)
    rng = random.Random(0)
    conversations = [make_conversation(rng) for _ in range(200)]
    examples = [Example(f"f:{i}", messages=messages) for i, messages in enumerate(conversations)]
    documents = [make_document(e, tokenizer, train_on="assistant", system=None) for e in examples]
    for messages, encoded in zip(conversations, TextEncoder(tokenizer).encode(documents), strict=True):
        oracle = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert encoded.ids.tolist() == oracle["input_ids"]
        assert np.flatnonzero(encoded.supervised).tolist() == np.flatnonzero(oracle["assistant_masks"]).tolist()
