"""Renders conversations with the tokenizer's chat template, and finds the answers in the rendered text.

The loss mask is derived from the text, which is rendered once for the whole conversation. Tokenizing messages one by
one would shift the mask, because tokens can span two messages; searching for the markers of known model families would
fail for the next family. So positions are measured and verified:

* **End of an answer.** The conversation is rendered again with a marker after each answer. Without the markers the
  result must equal the first rendering, character for character; then the markers were at the ends of the answers.
* **Beginning of an answer.** It is the end of the generation prompt, where generation begins when the model is served:
  the messages before the answer, rendered with ``add_generation_prompt``. Some templates render history differently
  (they move the system prompt or drop reasoning); then only the part from the end of the previous message to the end of
  the generation prompt is compared. Spaces at the end of the prompt belong to the answer: tokens include the space
  before a word, so a boundary after the space would split the first token of the answer.
* **End of an answer that calls tools.** Calls are written in many ways, so nothing is searched in them: the answer ends
  where the end of turn begins that the template writes after a plain answer in the same place.
* **End of a turn.** It is the first control token after the answer.

A template that fails the verification is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jinja2

from ingle.data.sandbox import Sandbox
from ingle.data.types import Example, Message, Tokenizer
from ingle.errors import DataError

TrainOn = Literal["assistant", "last", "all"]

#: Stands for an answer when a prompt is tokenized, because the tokens at the end of a prompt depend on what follows.
ANSWER = "a"

#: Remarks of :func:`locate_answers`; shown once with a count.
PROMPT_DIFFERS = "The chat template's generation prompt differs from the beginning of its rendered answers."
HISTORY_DIFFERS = (
    "The chat template renders the messages before the last answer differently if the answer is present, so the prompt "
    "in training differs from the prompt in use (put a missing system message into the first user message)."
)
TRAILING_SPACE = (
    "The chat template's generation prompt ends in a space. Ingle counts the space as part of the answer, because "
    "tokens include the space before a word; other servers may not (use a template without that space)."
)
ANSWER_CHANGED = "The chat template omits or changes part of an answer, perhaps its reasoning."


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant turn in the rendered text, in characters.

    Attributes:
        start: End of the generation prompt.
        content_end: End of the content; what follows up to ``end`` is the template's end of turn.
        end: Latest end of the end of turn.
    """

    start: int
    content_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation, its answers, and remarks (constants of this module) on the template."""

    text: str
    answers: tuple[Answer, ...]
    remarks: tuple[str, ...] = ()


def has_template(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer can render conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    origin: str | None = None,
    tools: str = "",
    sandbox: Sandbox | None = None,
) -> str:
    """Renders a conversation, with its tools as JSON, with the tokenizer's chat template.

    An entered sandbox renders many conversations faster.

    Raises:
        DataError: The tokenizer has no template, or the template refuses the conversation.
        ModelError: The template takes too much time or memory.
    """
    _require_template(tokenizer, origin)
    sandbox = sandbox or Sandbox(tokenizer)
    with sandbox.limited(origin, len(messages)):
        return _Chat(sandbox, origin, tools).render(messages, add_generation_prompt=add_generation_prompt)


def _require_template(tokenizer: Tokenizer, origin: str | None) -> None:
    if not has_template(tokenizer):
        raise DataError(
            "The rows are conversations, but the tokenizer has no chat template.",
            where=origin,
            fix="--model.chat_template=FILE with a Jinja template, or use prompt and completion columns",
        )


@dataclass(frozen=True, slots=True)
class _Chat:
    """Renders the messages of one conversation, within limits that the caller has set."""

    sandbox: Sandbox
    origin: str | None
    tools: str = ""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.sandbox.renderer.render(messages, add_generation_prompt=add_generation_prompt, tools=self.tools)
        except (MemoryError, jinja2.TemplateSyntaxError):
            raise  # the template is at fault, not the row
        except Exception as error:  # a template raises whatever Python can raise
            raise self.sandbox.refusal(error, messages, self.origin) from error
        return self.sandbox.check_output(text, messages)


def read_conversation(example: Example, system: str | None = None) -> tuple[Message, ...]:
    """Returns the messages of an example; ``system`` is added if the conversation has no system message.

    A prompt and its completion become two messages without white space around them: the template adds its separators.
    """
    if example.messages:
        messages = example.messages
    else:
        assert example.prompt is not None and example.completion is not None, example.origin
        messages = (Message("user", example.prompt.strip()), Message("assistant", example.completion.strip()))
    if system is not None and messages[0].role not in ("system", "developer"):
        messages = (Message("system", system), *messages)
    return messages


def split_prompt(example: Example) -> tuple[str, str]:
    """Returns prompt and completion as two parts of one plain text, for training without a chat template.

    Spaces at the end of the prompt move to the completion, as with a template.
    """
    assert example.prompt is not None and example.completion is not None, example.origin
    prompt = example.prompt.rstrip(" ")
    return prompt, example.prompt[len(prompt) :] + example.completion


def locate_answers(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    train_on: TrainOn,
    origin: str | None = None,
    sandbox: Sandbox | None = None,
    tools: str = "",
) -> Rendering:
    """Renders a conversation that ends with an answer, and finds the answers that are trained on.

    With ``train_on="all"`` only the last answer is located, for its end of turn.

    Args:
        tokenizer: With a chat template.
        messages: The conversation.
        train_on: As ``data.train_on``.
        origin: ``file:line``, for errors.
        sandbox: Limits of the template; pass an entered one to render many conversations faster.
        tools: The tools of the conversation, as JSON.

    Raises:
        DataError: There is no template, or it refuses the conversation or cannot be masked.
        ModelError: The template takes too much time or memory.
    """
    _require_template(tokenizer, origin)
    sandbox = sandbox or Sandbox(tokenizer)
    with sandbox.limited(origin, len(messages)):
        return _locate(_Chat(sandbox, origin, tools), messages, train_on)


def _locate(chat: _Chat, messages: Sequence[Message], train_on: TrainOn) -> Rendering:
    text = chat.render(messages)
    _require_tools(chat, messages, text)
    indices = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "all" and messages[-1].role != "assistant":
        return Rendering(text, ())
    ends = _find_ends(chat, messages, indices, text)
    tail = text[ends[indices[-1]] :]
    answers, remarks = [], []
    for i in indices if train_on == "assistant" else indices[-1:]:
        start, remark = _find_start(chat, messages, i, text, ends)
        # Many templates render earlier turns differently as history; the context of the last answer must not change.
        if remark == PROMPT_DIFFERS or (remark == HISTORY_DIFFERS and i == indices[-1]):
            remarks.append(remark)
        if not messages[i].tool_calls and _find_content(messages[i].content, text, ends[i]) is None:
            remarks.append(ANSWER_CHANGED)
        if text[start - 1 : start] == " ":
            remarks.append(TRAILING_SPACE)
            start = len(text[:start].rstrip(" "))
        # The end of an inner turn is what it has in common with the end of the last turn; the next header follows.
        end = ends[i] + _measure_common(tail, text[ends[i] :])
        answers.append(Answer(start, ends[i], end))
    return Rendering(text, tuple(answers), tuple(dict.fromkeys(remarks)))


def _require_tools(chat: _Chat, messages: Sequence[Message], text: str) -> None:
    """Refuses a template that writes neither the tools of a conversation nor the calls in it."""
    lists = [each for each in (chat.tools, *(message.tool_calls for message in messages)) if each]
    functions = (each.get("function", each) for part in lists for each in json.loads(part))
    missing = next((each["name"] for each in functions if each["name"] not in text), None)
    if missing is not None:
        raise DataError(
            "The chat template ignores tools.",
            where=chat.origin,
            why=f"the tool {missing!r} is not in the rendered conversation",
            fix="use a template for tools: --model.chat_template=FILE, or remove tools and their calls from the rows",
        )


def _find_ends(chat: _Chat, messages: Sequence[Message], indices: Sequence[int], text: str) -> dict[int, int]:
    calls = {i: _find_call_end(chat, messages, i, text) for i in indices if messages[i].tool_calls}
    plain = [i for i in indices if i not in calls]
    for strip in (False, True):  # templates keep or strip white space at the end of an answer
        ends = _mark(chat, messages, plain, text, strip=strip)
        if ends is not None:
            return ends | calls
    why = "markers after the answers are not rendered exactly once, in order and without other changes"
    raise _cannot_mask(chat, why)


def _find_call_end(chat: _Chat, messages: Sequence[Message], i: int, text: str) -> int:
    """Returns where an answer with calls ends: before what the template writes after a plain answer."""
    ask, plain = list(messages[:i]), Message("assistant", "PlainAnswer")
    rendered, own = chat.render([*ask, plain]), chat.render([*ask, messages[i]])
    _, found, tail = rendered.rpartition(plain.content)
    end = len(own) - len(tail)
    if found and own.endswith(tail) and text.startswith(own[:end]):
        return end
    raise _cannot_mask(chat, f"the end of the calls in message {i + 1} cannot be found")


def _cannot_mask(chat: _Chat, why: str) -> DataError:
    return DataError(
        "The chat template cannot be masked.",
        where=chat.origin,
        why=why,
        fix="--data.train_on=all, or another template: --model.chat_template=FILE",
    )


def _mark(
    chat: _Chat,
    messages: Sequence[Message],
    indices: Sequence[int],
    text: str,
    *,
    strip: bool = False,
    add_generation_prompt: bool = False,
) -> dict[int, int] | None:
    """Returns where in ``text`` the contents of some messages end; None if that cannot be verified."""
    stem = "EndMark"
    while stem in text:
        stem += "k"
    marks = {i: f"{stem}{i:06d}z" for i in indices}
    marked = list(messages)
    for i, mark in marks.items():
        content = marked[i].content
        marked[i] = replace(marked[i], content=(content.rstrip() if strip else content) + mark)
    try:
        rest = chat.render(marked, add_generation_prompt=add_generation_prompt)
    except DataError:
        return None
    plain, ends = "", {}
    for i, mark in marks.items():
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        plain += before
        ends[i] = len(plain)
    return ends if plain + rest == text else None


def _find_start(
    chat: _Chat, messages: Sequence[Message], i: int, text: str, ends: dict[int, int]
) -> tuple[int, str | None]:
    """Returns where answer ``i`` begins in ``text``, and a remark if its prompt differs from that of a served model."""
    try:
        prompt = chat.render(messages[:i], add_generation_prompt=True)
    except DataError:
        prompt = None  # templates may refuse an empty history
    if prompt is not None and text.startswith(prompt) and len(prompt) <= ends[i]:
        return len(prompt), None
    content_start = _find_content(messages[i].content, text, ends[i])
    bound = content_start if content_start is not None else ends[i]
    if prompt is not None and i > 0:
        here = _end_of(chat, messages, i - 1, text, add_generation_prompt=False)
        there = _end_of(chat, messages[:i], i - 1, prompt, add_generation_prompt=True)
        if here is not None and there is not None:
            opening = prompt[there:]
            common = _measure_common(opening, text[here:])
            return min(here + common, bound), PROMPT_DIFFERS if common < len(opening) else HISTORY_DIFFERS
    if content_start is not None:
        return content_start, PROMPT_DIFFERS if prompt is not None else None
    raise _cannot_mask(chat, f"the text contains neither the generation prompt nor the content of message {i + 1}")


def _end_of(chat: _Chat, messages: Sequence[Message], i: int, text: str, *, add_generation_prompt: bool) -> int | None:
    """Returns where message ``i`` ends in a rendering, whether or not the template strips its white space."""
    for strip in (False, True):
        ends = _mark(chat, messages, [i], text, strip=strip, add_generation_prompt=add_generation_prompt)
        if ends is not None:
            return ends[i]
    return None


def _find_content(content: str, text: str, end: int) -> int | None:
    for candidate in (content, content.rstrip(), content.lstrip(), content.strip()):
        if text.endswith(candidate, 0, end):
            return end - len(candidate)
    return None


def _measure_common(a: str, b: str) -> int:
    """Returns the length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
