"""Reads headings, links and code blocks of Markdown pages."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

#: Pages that a program fills in and writes elsewhere.
TEMPLATES = {"examples/pretrain/card.md", "examples/pretrain/card-denoiser.md"}


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: Path of the page, relative to the repository.
        line: 1-based line of the opening fence.
        language: First word after the fence.
        marks: The words after it, e.g. ``run`` or ``file=train.jsonl``.
        text: Its content.
    """

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        """``page:line`` for a message."""
        return f"{self.page}:{self.line}"

    def mark(self, name: str) -> str | None:
        """Returns the value of the mark ``name=value``, or None."""
        return next((mark.partition("=")[2] for mark in self.marks if mark.startswith(f"{name}=")), None)


@dataclass(frozen=True)
class Page:
    """A Markdown page.

    Attributes:
        name: Path relative to the repository.
        text: Its content.
    """

    name: str
    text: str

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors of the page: headings as GitHub spells them, and explicit ids."""
        seen: dict[str, int] = {}
        found = set(re.findall(r'<a (?:id|name)="([^"]+)"', self.text))
        for token, inline in zip(self._tokens, self._tokens[1:], strict=False):
            if token.type == "heading_open":
                inside = inline.children or []
                words = "".join(child.content for child in inside if child.type in ("text", "code_inline"))
                slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
                found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
                seen[slug] = seen.get(slug, 0) + 1
        return found

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        """The line and target of every link and picture."""
        found = []
        for token in self._tokens:
            for child in token.children or []:
                target = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
                if target:
                    found.append((token.map[0] + 1 if token.map else 0, str(target)))
        return found

    @cached_property
    def blocks(self) -> list[Block]:
        """All fenced code blocks."""
        found = []
        for token in self._tokens:
            if token.type == "fence":
                language, *marks = token.info.split() or [""]
                found.append(Block(self.name, (token.map or [0])[0] + 1, language, tuple(marks), token.content))
        return found


def tracked(root: Path) -> list[str]:
    """Returns the paths of all files that git tracks or does not ignore, relative to ``root``."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def read_pages(root: Path) -> list[Page]:
    """Returns all Markdown pages except the templates."""
    names = [name for name in tracked(root) if name.endswith(".md") and name not in TEMPLATES]
    return [Page(name, (root / name).read_text()) for name in names]
