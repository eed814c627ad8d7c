"""What rows are compared by: their prompt and their answer, without differences of case, form and white space."""

from __future__ import annotations

import unicodedata

from ingle.data.types import Example, Span, last_answer


def fold(text: str) -> str:
    """Returns a text without differences of case, Unicode form and white space."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def read_parts(example: Example) -> tuple[str, str]:
    """Returns the folded prompt and answer of a row; the prompt of plain text is empty.

    The answer to a text with a label is its label.
    """
    if example.label is not None:
        texts = [text.text or "" for text in example.texts.values()] or [example.text or ""]
        return fold("\n".join(texts)), fold(show_label(example))
    if example.texts:  # a prompt that all texts share, and everything that follows it
        parts = [read_parts(text) for text in example.texts.values()]
        return parts[0][0], "\n".join(answer for _, answer in parts)
    if example.text is not None:
        return "", fold(example.text)
    if example.prompt is not None:
        return fold(example.prompt), fold(example.completion or "")
    turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    return fold("\n".join(turn.written for turn in turns)), fold(last_answer(example) or "")


def read_shared(example: Example) -> str | None:
    """Returns the folded text that rows about the same thing share; None if a row has no such text.

    It is the context of a question, or the first of two texts such as a premise.
    """
    for name in ("context", "text"):
        if name in example.texts:
            return fold(example.texts[name].text or "")
    return None


def show_label(example: Example) -> str:
    """Returns the label of a row as text: its classes, its tags, or the accepted answers; empty if it has none."""
    label = example.label
    if label is None or isinstance(label, str):
        return label or ""
    if any(isinstance(item, Span) for item in label):
        return " / ".join(example.references)
    return " ".join(map(str, label))
