"""Tokenizes a prompt for generation, exactly as training tokenizes the beginning of the same row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ingle.data.control import ControlTokens
from ingle.data.sandbox import Sandbox
from ingle.data.template import ANSWER, has_template, read_conversation, render, split_prompt
from ingle.data.types import Example, Message, Tokenizer
from ingle.errors import DataError

#: Returns ids and offsets of the prompt with something appended.
_Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


def prompt_ids(
    tokenizer: Tokenizer,
    example: Example,
    system: str | None = None,
    *,
    control: ControlTokens | None = None,
    sandbox: Sandbox | None = None,
) -> list[int]:
    """Returns the ids to generate from.

    Args:
        tokenizer: With or without a chat template.
        example: A conversation (its last answer is ignored) or a prompt.
        system: As ``data.system``.
        control: What happens to control tokens in messages; by default they are read as text.
        sandbox: Limits of the template; pass an entered one to render many conversations faster.

    Raises:
        DataError: Plain text has no prompt; a conversation needs a chat template.
        ModelError: The chat template takes too much time or memory.
    """
    if example.text is not None:
        raise DataError("Plain text has no prompt to answer.", where=example.origin, fix="use prompt and completion")
    control = control or ControlTokens(tokenizer)
    if example.messages or has_template(tokenizer):
        messages = list(read_conversation(example, system))
        while messages and messages[-1].role == "assistant":
            messages.pop()
        hidden = control.shield(messages, example.origin, example.tools)
        shown = render(
            tokenizer,
            hidden.messages,
            add_generation_prompt=True,
            origin=example.origin,
            tools=hidden.tools,
            sandbox=sandbox,
        ).rstrip(" ")
        chat = True
    else:
        hidden = control.shield([Message("user", split_prompt(example)[0])], example.origin)
        shown, chat = hidden.messages[0].content, False
    text = hidden.reveal(shown)

    def encode(end: str) -> tuple[list[int], list[tuple[int, int]]]:
        if hidden.hidden is None:
            found: Any = tokenizer(text + end, add_special_tokens=not chat, return_offsets_mapping=True)
            return [int(i) for i in found["input_ids"]], found["offset_mapping"]
        found = control.encode(text + end, shown + end, example.origin, add_special_tokens=not chat)
        return found.ids, found.offsets

    ids = _cut_before_answer(encode, len(text))
    while not chat and ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it to every text
        ids.pop()
    return ids


def _cut_before_answer(encode: _Encode, length: int) -> list[int]:
    """Returns the ids that a prompt has before an answer, which decides how white space at its end is tokenized."""
    ids, offsets = encode(ANSWER)
    border = next(i for i, (_, end) in enumerate(offsets) if end > length)
    if offsets[border][0] < length:  # a token spans prompt and answer, which depends on the answer
        return encode("")[0]
    return ids[:border]
