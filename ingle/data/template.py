"""The chat template: rendered once for the whole conversation, and where in the text the answers are.

The loss mask is derived from the rendered text.  Tokenizing pieces apart would shift it, because tokens merge
across borders; reading markers of known families would fail on the next family.  So positions are found by
experiment and proved:

* **Where an answer ends.** The conversation is rendered again with a marker after each answer.  Taking the
  markers out must give the first rendering back, character for character; then they stand where the answers end.
* **Where an answer begins.** At the end of the generation prompt, since that is where the model takes over when
  it is served: the rendering of the messages before it with ``add_generation_prompt``.  Where a template renders
  history differently (it moves the system prompt, drops reasoning), only the part from the end of the message
  before to the end of the generation prompt is compared.
  Spaces at its end count to the answer: tokens carry the space before a word, so a border after the space would cut
  the first token of the answer in two.
* **Where a turn ends.** The tokenizer decides: the first control token after the answer is the end of turn.

A template for which the proof fails is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from ingle.data.sandbox import check_size, refusal, sandboxed
from ingle.data.types import Example, Message, Tokenizer
from ingle.errors import DataError

TrainOn = Literal["assistant", "last", "all"]

#: Stands for an answer where its beginning has a say in how the prompt is cut into tokens.
ANSWER = "a"

#: What :func:`locate_answers` may remark on; shown once with a count.
PROMPT_DIFFERS = "the chat template's generation prompt is not what its rendered answers begin with"
HISTORY_DIFFERS = (
    "the chat template renders the messages before the last answer differently once the answer is there, so what is "
    "served is not what is trained (is a system message missing? put it into the first user message)"
)
TRAILING_SPACE = (
    "the chat template's generation prompt ends in a space; tokens carry the space before a word, so it is left to the "
    "answer (other servers may not do so: a template without that space is safer)"
)
ANSWER_CHANGED = "the chat template leaves out or changes part of an answer (reasoning?)"


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant turn in the rendered text, in characters.

    Attributes:
        start: End of the generation prompt.
        content_end: End of the content; what follows up to ``end`` is the template's end of turn.
        end: Where the end of turn ends at the latest.
    """

    start: int
    content_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation and its answers, with remarks (constants of this module) on what was found."""

    text: str
    answers: tuple[Answer, ...]
    remarks: tuple[str, ...] = ()


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether conversations can be rendered."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False, origin: str | None = None
) -> str:
    """The text of a conversation by the tokenizer's own chat template.

    Raises:
        DataError: The tokenizer has no template, or the template refuses the conversation.
        ModelError: The template takes too much time or memory.
    """
    _require_template(tokenizer, origin)
    with sandboxed(tokenizer, origin, len(messages)):
        return _render(tokenizer, messages, add_generation_prompt=add_generation_prompt, origin=origin)


def _require_template(tokenizer: Tokenizer, origin: str | None) -> None:
    if not has_template(tokenizer):
        raise DataError(
            "The data are conversations, but the tokenizer has no chat template.",
            where=origin,
            fix="name a Jinja file with model.chat_template=, or use prompt and completion columns",
        )


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False, origin: str | None = None
) -> str:
    """As :func:`render`, within limits that the caller has set."""
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: Any = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (MemoryError, jinja2.TemplateSyntaxError):
        raise  # no row can help
    except Exception as error:  # a template raises whatever Python can raise
        raise refusal(error, tokenizer, messages, origin) from error
    return check_size(str(text), tokenizer, messages)


def read_conversation(example: Example, system: str | None = None) -> tuple[Message, ...]:
    """The conversation an example stands for; a system message is put before one that has none.

    White space around a prompt and its completion is left out: the template brings its own separators.
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
    """Prompt and completion as plain text whose sum is what is trained on without a chat template.

    Spaces at the end of the prompt go to the completion, as with a template.
    """
    assert example.prompt is not None and example.completion is not None, example.origin
    prompt = example.prompt.rstrip(" ")
    return prompt, example.prompt[len(prompt) :] + example.completion


def locate_answers(
    tokenizer: Tokenizer, messages: Sequence[Message], *, train_on: TrainOn, origin: str | None = None
) -> Rendering:
    """Render a conversation that ends with an answer, and find the answers that are trained on.

    With ``train_on="all"`` only the last answer is located, for its end of turn.

    Raises:
        DataError: There is no template, or it refuses the conversation or cannot be masked.
        ModelError: The template takes too much time or memory.
    """
    _require_template(tokenizer, origin)
    with sandboxed(tokenizer, origin, len(messages)):
        return _locate(tokenizer, messages, train_on, origin)


def _locate(tokenizer: Tokenizer, messages: Sequence[Message], train_on: TrainOn, origin: str | None) -> Rendering:
    text = _render(tokenizer, messages, origin=origin)
    indices = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "all" and messages[-1].role != "assistant":
        return Rendering(text, ())
    ends = _find_ends(tokenizer, messages, indices, text, origin)
    tail = text[ends[indices[-1]] :]
    answers, remarks = [], []
    for i in indices if train_on == "assistant" else indices[-1:]:
        start, remark = _find_start(tokenizer, messages, i, text, ends, origin)
        # Earlier turns as history look different in many templates; what the last answer sees must not.
        if remark == PROMPT_DIFFERS or (remark == HISTORY_DIFFERS and i == indices[-1]):
            remarks.append(remark)
        if _find_content(messages[i].content, text, ends[i]) is None:
            remarks.append(ANSWER_CHANGED)
        if text[start - 1 : start] == " ":
            remarks.append(TRAILING_SPACE)
            start = len(text[:start].rstrip(" "))
        # The end of an inner turn is what it has in common with that of the last; the rest is the next header.
        end = ends[i] + _measure_common(tail, text[ends[i] :])
        answers.append(Answer(start, ends[i], end))
    return Rendering(text, tuple(answers), tuple(dict.fromkeys(remarks)))


def _find_ends(
    tokenizer: Tokenizer, messages: Sequence[Message], indices: Sequence[int], text: str, origin: str | None
) -> dict[int, int]:
    for strip in (False, True):  # templates either keep white space at the end of an answer or strip it
        ends = _mark(tokenizer, messages, indices, text, strip=strip)
        if ends is not None:
            return ends
    raise DataError(
        "The chat template cannot be masked.",
        where=origin,
        why="a marker put after each answer does not come out once, in order, and without changing anything else",
        fix="data.train_on=all, or another template with model.chat_template=",
    )


def _mark(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    indices: Sequence[int],
    text: str,
    *,
    strip: bool = False,
    add_generation_prompt: bool = False,
) -> dict[int, int] | None:
    """Where in ``text`` the contents of some messages end, or None when that cannot be proved."""
    stem = "EndMark"
    while stem in text:
        stem += "k"
    marks = {i: f"{stem}{i:06d}z" for i in indices}
    marked = list(messages)
    for i, mark in marks.items():
        content = marked[i].content
        marked[i] = Message(marked[i].role, (content.rstrip() if strip else content) + mark)
    try:
        rest = _render(tokenizer, marked, add_generation_prompt=add_generation_prompt)
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
    tokenizer: Tokenizer, messages: Sequence[Message], i: int, text: str, ends: dict[int, int], origin: str | None
) -> tuple[int, str | None]:
    """Where answer ``i`` begins in ``text``, and how what is served differs from what stands before it."""
    try:
        prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
    except DataError:
        prompt = None  # templates may refuse an empty history
    if prompt is not None and text.startswith(prompt) and len(prompt) <= ends[i]:
        return len(prompt), None
    content_start = _find_content(messages[i].content, text, ends[i])
    bound = content_start if content_start is not None else ends[i]
    if prompt is not None and i > 0:
        here = _end_of(tokenizer, messages, i - 1, text, add_generation_prompt=False)
        there = _end_of(tokenizer, messages[:i], i - 1, prompt, add_generation_prompt=True)
        if here is not None and there is not None:
            opening = prompt[there:]
            common = _measure_common(opening, text[here:])
            return min(here + common, bound), PROMPT_DIFFERS if common < len(opening) else HISTORY_DIFFERS
    if content_start is not None:
        return content_start, PROMPT_DIFFERS if prompt is not None else None
    raise DataError(
        "The chat template cannot be masked.",
        where=origin,
        why=f"the beginning of message {i + 1} is not found: neither its generation prompt nor its content is there",
        fix="data.train_on=all, or another template with model.chat_template=",
    )


def _end_of(
    tokenizer: Tokenizer, messages: Sequence[Message], i: int, text: str, *, add_generation_prompt: bool
) -> int | None:
    """Where message ``i`` ends in a rendering, whether the template strips it or not."""
    for strip in (False, True):
        ends = _mark(tokenizer, messages, [i], text, strip=strip, add_generation_prompt=add_generation_prompt)
        if ends is not None:
            return ends[i]
    return None


def _find_content(content: str, text: str, end: int) -> int | None:
    for candidate in (content, content.rstrip(), content.lstrip(), content.strip()):
        if text.endswith(candidate, 0, end):
            return end - len(candidate)
    return None


def _measure_common(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
