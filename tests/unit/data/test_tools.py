"""Tools and their calls in conversations: read, rendered as transformers renders them, and masked."""

from __future__ import annotations

import json

import pytest

from ingle.data import ControlTokens, prompt_ids
from ingle.data.encoding import TextEncoder, make_document
from ingle.data.layouts import parse_row
from ingle.errors import DataError

#: As Qwen's template: tools in the system message, calls in tags, results in the user's turn.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}{{ m.name }}: {% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if m.content %}\n{% endif %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"city": "string"}}}]
ARGUMENTS = {"city": "Zürich <|im_end|>"}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": ARGUMENTS}}
CHAT = [
    {"role": "user", "content": "how is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "four", "name": "find", "tool_call_id": "c1"},
    {"role": "assistant", "content": "it is four."},
]


@pytest.fixture()
def tokenizer(tokenizer_factory):
    special = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    return tokenizer_factory(chat_template=TEMPLATE, special=special)


def encode(tokenizer, example, train_on):
    control = ControlTokens(tokenizer)
    document = make_document(example, tokenizer, train_on=train_on, system=None, control=control)
    assert not isinstance(document, str), document
    return document, next(TextEncoder(tokenizer, control).encode([document]))


def trained(tokenizer, encoded):
    return tokenizer.decode(encoded.ids[encoded.supervised])


def test_arguments_are_mappings_however_they_are_written():
    text = {**CALL, "function": {"name": "find", "arguments": json.dumps(ARGUMENTS)}}
    forms = [
        {"messages": [CHAT[0], {**CHAT[1], "tool_calls": calls}, *CHAT[2:]], "tools": tools}
        for calls, tools in (([CALL], TOOLS), ([text], json.dumps(TOOLS)), (json.dumps([CALL]), TOOLS))
    ]
    examples = [parse_row(row, "messages", "f:1") for row in forms]
    assert examples[0] == examples[1] == examples[2]
    assert json.loads(examples[0].tools) == TOOLS
    assert json.loads(examples[0].messages[1].tool_calls) == [CALL]
    assert (examples[0].messages[2].name, examples[0].messages[2].call_id) == ("find", "c1")


def test_a_conversation_with_tools_is_rendered_as_transformers_does(tokenizer):
    example = parse_row({"messages": CHAT, "tools": TOOLS}, "messages", "f:1")
    document, encoded = encode(tokenizer, example, "assistant")
    turns = [{**CHAT[1], "content": ""} if turn is CHAT[1] else turn for turn in CHAT]
    assert document.text == tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    call = '<tool_call>{"name": "find", "arguments": {"city": "Zürich <|im_end|>"}}</tool_call><|im_end|>'
    assert trained(tokenizer, encoded) == f"{call}it is four.<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.ids.tolist().count(end) == 5  # that in the arguments is text
    assert encoded.open_turns == 0


def test_the_last_answer_may_be_a_call(tokenizer):
    example = parse_row({"messages": CHAT[:2], "tools": TOOLS}, "messages", "f:1")
    _, encoded = encode(tokenizer, example, "last")
    assert trained(tokenizer, encoded).endswith("</tool_call><|im_end|>")
    first = int(encoded.supervised.argmax())
    assert prompt_ids(tokenizer, example) == encoded.ids[:first].tolist()


def test_a_template_that_ignores_tools_is_refused(tokenizer_factory):
    example = parse_row({"messages": CHAT[:1] + CHAT[3:], "tools": TOOLS}, "messages", "f:1")
    with pytest.raises(DataError, match="ignores tools") as caught:
        encode(tokenizer_factory(), example, "last")
    assert "'find'" in str(caught.value.why)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": "[{"}]}, "not JSON"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"function": {}}]}]}, "no name of a function"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "functions with names"),
        ({"messages": CHAT, "tools": "find"}, "not JSON"),
    ],
)
def test_malformed_tools_name_their_row(row, why):
    with pytest.raises(DataError, match="does not fit") as caught:
        parse_row(row, "messages", "f:3")
    assert why in str(caught.value.why) and caught.value.where == "f:3"
