"""Masks derived from real families of chat templates: exactly the answers and their ends of turn carry loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ingle.data.encoding import TextEncoder, make_document
from ingle.data.prompt import prompt_ids
from ingle.data.template import (
    ANSWER_CHANGED,
    HISTORY_DIFFERS,
    PROMPT_DIFFERS,
    TRAILING_SPACE,
    locate_answers,
    render,
)
from ingle.data.types import Example, Message
from ingle.errors import DataError

QWEN2 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501

#: A reasoning model whose generation prompt opens the reasoning, as Qwen3's thinking-only releases.
THINKING = QWEN3.replace(
    "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}", "{{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
)

#: The same, but answers are rendered without any reasoning (as DeepSeek-R1's distilled models).
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|User|>' + message['content'] }}{% endif %}{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

#: A later Mistral: the system message goes into the last user message, if that is the last message.
MISTRAL_V3 = (
    '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}'
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    '{{- bos_token }}{%- for message in loop_messages %}{%- if message["role"] == "user" %}'
    '{%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\n\n" + message["content"] + '
    '"[/INST]" }}{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}'
    '{%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}{%- endif %}{%- endfor %}'
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

#: Plain words only: no control token ends a turn.
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens it needs, and what of a two-turn conversation must carry loss."""

    template: str
    first: str = "It is four.{end}"
    second: str = "Yes!{end}"
    end: str = "<|im_end|>"
    bos: str | None = None
    eos: str = "<|endoftext|>"
    special: tuple[str, ...] = ()
    system: bool = True

    def tokenizer(self, factory):
        special = tuple(dict.fromkeys((*self.special, self.end)))
        special = tuple(token for token in special if token not in (self.bos, self.eos))
        return factory(
            special=special, bos=self.bos, eos=self.eos, chat_template=self.template, add_bos=self.bos is not None
        )

    def supervised(self, text: str) -> str:
        return text.format(end=self.end)


FAMILIES = {
    "qwen2": Family(QWEN2, special=("<|im_start|>",)),
    "qwen3": Family(QWEN3, second="<think>\n\n</think>\n\nYes!{end}", special=("<|im_start|>",)),
    "llama3": Family(
        LLAMA3,
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "llama2": Family(LLAMA2, first=" It is four. {end}", second=" Yes! {end}", end="</s>", bos="<s>", eos="</s>"),
    "mistral": Family(MISTRAL, end="</s>", bos="<s>", eos="</s>", system=False),
    "mistral-v3": Family(
        MISTRAL_V3,
        first=" It is four.{end}",
        second=" Yes!{end}",
        end="</s>",
        bos="<s>",
        eos="</s>",
        special=("[INST]", "[/INST]"),
        system=False,  # it has one, which vanishes; see below
    ),
    "gemma": Family(GEMMA, end="<end_of_turn>", bos="<bos>", eos="<eos>", special=("<start_of_turn>",), system=False),
    "phi3": Family(PHI3, end="<|end|>", special=("<|system|>", "<|user|>", "<|assistant|>")),
    "zephyr": Family(ZEPHYR, end="</s>", bos="<s>", eos="</s>"),
}

QUESTION, FOLLOW_UP = "What is two plus two?", "Are you sure?"


def converse(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    turns = tuple(Message(roles[i % 2], content) for i, content in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


def encode(tokenizer, messages, train_on="assistant"):
    document = make_document(Example("f:1", messages=tuple(messages)), tokenizer, train_on=train_on, system=None)
    (encoded,) = TextEncoder(tokenizer).encode([document])
    return encoded


def spoken(tokenizer, encoded) -> list[str]:
    """The supervised stretches of text."""
    stretches: list[list[int]] = []
    before = False
    for token, on in zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True):
        if on and not before:
            stretches.append([])
        if on:
            stretches[-1].append(token)
        before = on
    return [tokenizer.decode(part, skip_special_tokens=False) for part in stretches]


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def test_answers_and_their_ends_of_turn_carry_loss_and_nothing_else(family, tokenizer_factory):
    tokenizer = family.tokenizer(tokenizer_factory)
    messages = converse(QUESTION, "It is four.", FOLLOW_UP, "Yes!")
    expected = [family.supervised(family.first), family.supervised(family.second)]
    assert spoken(tokenizer, encode(tokenizer, messages)) == expected
    assert spoken(tokenizer, encode(tokenizer, messages, "last")) == expected[1:]


def test_ids_are_those_of_the_whole_rendering(family, tokenizer_factory):
    tokenizer = family.tokenizer(tokenizer_factory)
    messages = converse(QUESTION, "It is four.", FOLLOW_UP, "Yes!")
    chat = [{"role": m.role, "content": m.content} for m in messages]
    whole = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert encode(tokenizer, messages).ids.tolist() == whole
    if family.bos is not None and family.template != LLAMA2:
        assert whole.count(tokenizer.bos_token_id) == (1 if family.bos in render(tokenizer, messages) else 0)


@pytest.mark.parametrize(
    ("name", "system"),
    [(name, None) for name in FAMILIES] + [(name, "Be brief.") for name, f in FAMILIES.items() if f.system],
)
def test_training_begins_with_the_ids_that_are_served(name, system, tokenizer_factory):
    tokenizer = FAMILIES[name].tokenizer(tokenizer_factory)
    example = Example("f:1", messages=converse(QUESTION, "Yes!", system=system))
    ids = prompt_ids(tokenizer, example)
    encoded = encode(tokenizer, example.messages)
    assert encoded.ids[: len(ids)].tolist() == ids
    assert not encoded.supervised[: len(ids)].any()
    assert encoded.supervised[len(ids)]
    pair = Example("f:1", prompt=f"{QUESTION}\n", completion=" Yes!")
    assert prompt_ids(tokenizer, pair, system) == ids


def test_everything_carries_loss_with_train_on_all(family, tokenizer_factory):
    tokenizer = family.tokenizer(tokenizer_factory)
    encoded = encode(tokenizer, converse(QUESTION, "It is four.", FOLLOW_UP, "Yes!"), "all")
    assert not encoded.supervised[0]
    assert encoded.supervised[1:].all()


def test_content_is_found_when_it_looks_like_the_template(family, tokenizer_factory):
    """Contents that repeat the scaffolding, each other or nothing but white space at their ends."""
    tokenizer = family.tokenizer(tokenizer_factory)
    messages = converse("assistant", "user\nassistant", "EndMark000001z", "  assistant\nEndMark000003z  \n")
    encoded = encode(tokenizer, messages)
    first, second = spoken(tokenizer, encoded)
    assert first.strip() == f"user\nassistant{family.end}" or first == f" user\nassistant {family.end}"
    assert second.split("</think>")[-1].removesuffix(family.end).strip() == "assistant\nEndMark000003z"


def test_qwen3_drops_former_reasoning_and_keeps_the_last(tokenizer_factory):
    tokenizer = FAMILIES["qwen3"].tokenizer(tokenizer_factory)
    answer = "<think>\nhm\n</think>\n\nfour"
    messages = converse(QUESTION, answer, FOLLOW_UP, answer)
    found = locate_answers(tokenizer, messages, train_on="assistant")
    assert [found.text[a.start : a.content_end] for a in found.answers] == ["four", answer]
    assert found.remarks == (ANSWER_CHANGED,)  # of the first, as the template has it
    assert locate_answers(tokenizer, messages, train_on="last").remarks == ()


def test_tool_responses_are_no_user_turns(tokenizer_factory):
    """Qwen3 treats a user message that is all tool response as part of the turn: reasoning before it stays."""
    tokenizer = FAMILIES["qwen3"].tokenizer(tokenizer_factory)
    call = "<think>\nlook it up\n</think>\n\ncall"
    messages = converse(QUESTION, call, "<tool_response>4</tool_response>", "four")
    found = locate_answers(tokenizer, messages, train_on="assistant")
    assert [found.text[a.start : a.end] for a in found.answers] == [
        f"{call}<|im_end|>\n",
        "<think>\n\n</think>\n\nfour<|im_end|>\n",
    ]


def test_a_generation_prompt_that_opens_the_reasoning(tokenizer_factory):
    tokenizer = tokenizer_factory(chat_template=THINKING)
    messages = converse(QUESTION, "<think>\nhm\n</think>\n\nfour")
    found = locate_answers(tokenizer, messages, train_on="assistant")
    assert [found.text[a.start : a.content_end] for a in found.answers] == ["hm\n</think>\n\nfour"]
    assert found.remarks == ()


def test_a_generation_prompt_that_no_answer_begins_with_is_remarked(tokenizer_factory):
    tokenizer = tokenizer_factory(chat_template=R1, bos="<bos>", eos="<eos>", special=("<|User|>", "<|Assistant|>"))
    found = locate_answers(tokenizer, converse(QUESTION, "<think>\nhm\n</think>four"), train_on="assistant")
    assert [found.text[a.start : a.content_end] for a in found.answers] == ["four"]
    assert set(found.remarks) == {PROMPT_DIFFERS, ANSWER_CHANGED}
    # The generation prompt's "<" is also the answer's: only what both share up to the content belongs to the prompt.
    found = locate_answers(tokenizer, converse(QUESTION, "<b>four</b>"), train_on="assistant")
    assert [found.text[a.start : a.content_end] for a in found.answers] == ["<b>four</b>"]


def test_a_system_message_that_vanishes_once_answered_is_remarked(tokenizer_factory):
    tokenizer = FAMILIES["mistral-v3"].tokenizer(tokenizer_factory)
    messages = converse(QUESTION, "four", FOLLOW_UP, "Yes!", system="Be brief.")
    found = locate_answers(tokenizer, messages, train_on="assistant")
    assert [found.text[a.start : a.end] for a in found.answers] == [" four</s>", " Yes!</s>"]
    assert found.remarks == (HISTORY_DIFFERS,)


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_template_without_system_role_refuses_it_by_name(name, tokenizer_factory):
    tokenizer = FAMILIES[name].tokenizer(tokenizer_factory)
    with pytest.raises(DataError) as caught:
        locate_answers(tokenizer, converse(QUESTION, "four", system="x"), train_on="assistant", origin="t.jsonl:7")
    assert caught.value.where == "t.jsonl:7"
    assert "system" in str(caught.value)


def test_without_an_end_of_turn_the_text_is_closed_and_the_rest_counted(tokenizer_factory):
    tokenizer = tokenizer_factory(chat_template=VICUNA)
    encoded = encode(tokenizer, converse(QUESTION, "four", FOLLOW_UP, "Yes!"))
    assert spoken(tokenizer, encoded) == [" four\n", " Yes!\n<|endoftext|>"]
    assert encoded.open_turns == 1  # the first
    everything = encode(tokenizer, converse(QUESTION, "four"), "all")
    assert everything.ids[-1] == tokenizer.eos_token_id
    assert everything.supervised[1:].all()


def test_what_follows_only_the_last_answer_is_no_end_of_inner_turns(tokenizer_factory):
    template = VICUNA.replace(
        "+ '\n' }}{% endif %}{% endfor %}",
        "+ '\n' }}{% if loop.last %}{{ 'THE END' }}{% endif %}{% endif %}{% endfor %}",
    )
    encoded = encode(tokenizer_factory(chat_template=template), converse(QUESTION, "four", FOLLOW_UP, "Yes!"))
    assert spoken(tokenizer_factory(), encoded) == [" four\n", " Yes!\nTHE END<|endoftext|>"]


def test_history_that_looks_different_to_inner_answers_is_no_remark(tokenizer_factory):
    """A template that marks the latest question: what an inner answer saw differs, what the last one sees does not."""
    template = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role }}{{ ' (latest)' if loop.index0 == ns.last }}"
        "{{ '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = converse(QUESTION, "four", FOLLOW_UP, "Yes!")
    found = locate_answers(tokenizer_factory(chat_template=template), messages, train_on="assistant")
    assert [found.text[a.start : a.content_end] for a in found.answers] == ["four", "Yes!"]
    assert found.remarks == ()


def test_end_of_turn_written_in_plain_words(tokenizer_factory):
    """ChatML on a tokenizer that does not know its tokens: the words of the end of turn carry loss, then EOS."""
    tokenizer = tokenizer_factory(special=())
    encoded = encode(tokenizer, converse(QUESTION, "four", FOLLOW_UP, "Yes!"))
    assert spoken(tokenizer, encoded) == ["four<|im_end|>\n", "Yes!<|im_end|>\n<|endoftext|>"]


@pytest.mark.parametrize(
    "content", ["{{ m['content'] | upper }}", "{{ m['content'][:3] }}", "{{ m['content'] | length }}", "fixed"]
)
def test_a_template_that_cannot_be_masked_is_refused(content, tokenizer_factory):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + content + "<|im_end|>{% else %}u{% endif %}"
        "{% endfor %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    with pytest.raises(DataError, match="cannot be masked") as caught:
        locate_answers(tokenizer, converse(QUESTION, "four and more"), train_on="assistant", origin="t.jsonl:3")
    assert caught.value.where == "t.jsonl:3"
    assert "train_on=all" in str(caught.value.fix)


def test_a_template_that_refuses_an_empty_history_is_masked_by_content(tokenizer_factory):
    template = "{{ messages[0]['role'] }}: {% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_factory(chat_template=template)
    messages = (Message("assistant", "hello"), Message("user", "hi"), Message("assistant", "you"))
    assert spoken(tokenizer, encode(tokenizer, messages)) == [" hello<|im_end|>", "you<|im_end|>"]


def test_a_generation_prompt_that_ends_in_a_space(tokenizer_factory):
    """The space is part of the first word's token, so the answer begins with it, in training and when served."""
    template = VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: '")
    tokenizer = tokenizer_factory(chat_template=template)
    example = Example("f:1", messages=converse("hello", "world"))
    encoded = encode(tokenizer, example.messages)
    assert spoken(tokenizer, encoded) == [" world\n<|endoftext|>"]
    ids = prompt_ids(tokenizer, example)
    assert encoded.ids[: len(ids)].tolist() == ids
    assert encoded.supervised[len(ids)]
    assert TRAILING_SPACE in locate_answers(tokenizer, example.messages, train_on="last").remarks


def test_conversations_need_a_template(tokenizer_factory):
    tokenizer = tokenizer_factory(chat_template=None)
    with pytest.raises(DataError, match="no chat template") as caught:
        encode(tokenizer, converse(QUESTION, "four"))
    assert "--model.chat_template=FILE" in str(caught.value.fix)
    assert caught.value.where == "f:1"


def test_what_follows_the_last_answer_is_left_out(tokenizer):
    messages = converse(QUESTION, "four", FOLLOW_UP)
    assert encode(tokenizer, messages).ids.tolist() == encode(tokenizer, messages[:2]).ids.tolist()
    assert len(encode(tokenizer, messages, "all").ids) > len(encode(tokenizer, messages[:2]).ids)
