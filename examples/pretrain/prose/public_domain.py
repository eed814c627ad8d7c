"""Passages of public-domain books that the user has at hand, so that the model also meets real English."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PASSAGE_CHARACTERS = 1_600


def passages(path: Path) -> Iterator[str]:
    """Cuts a text at paragraph ends into passages of about :data:`PASSAGE_CHARACTERS`."""
    text = re.sub(r"[ \t]+", " ", path.read_text(encoding="utf-8", errors="replace")).replace("\r\n", "\n")
    text = re.sub(r" ?\n ?", "\n", text)
    blank = "\n\n" if text.count("\n\n") > len(text) / 2_000 else "\n"
    passage = ""
    for paragraph in re.split(r"\n{2,}" if blank == "\n\n" else r"\n+", text):
        paragraph = paragraph.strip()
        if passage and len(passage) + len(paragraph) > PASSAGE_CHARACTERS:
            yield passage
            passage = ""
        if paragraph:
            passage += (blank if passage else "") + paragraph
    if passage:
        yield passage
