"""What the checks need to know of a Markdown page: its headings, links and code blocks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

TEMPLATES = {"examples/pretrain/card.md"}


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: Path of the page from the repository's root.
        line: Line of the opening fence, counted from 1.
        language: First word after the fence.
        marks: The words after it, e.g. ``run`` or ``file=train.jsonl``.
        text: What is inside.
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
        """The value of the mark ``name=value``, or None."""
        return next((mark.partition("=")[2] for mark in self.marks if mark.startswith(f"{name}=")), None)


@dataclass(frozen=True)
class Page:
    """A Markdown page.

    Attributes:
        name: Path from the repository's root.
        text: Its content.
    """

    name: str
    text: str

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @cached_property
    def anchors(self) -> set[str]:
        """What ``#...`` may name: headings as GitHub spells them, and explicit ids."""
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
        """Line and target of every link and picture."""
        return list(self._walk_links())

    def _walk_links(self) -> Iterator[tuple[int, str]]:
        for token in self._tokens:
            for child in token.children or []:
                target = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
                if target:
                    yield (token.map[0] + 1 if token.map else 0), str(target)

    @cached_property
    def blocks(self) -> list[Block]:
        """Every fenced code block."""
        found = []
        for token in self._tokens:
            if token.type == "fence":
                language, *marks = token.info.split() or [""]
                found.append(Block(self.name, (token.map or [0])[0] + 1, language, tuple(marks), token.content))
        return found


def tracked(root: Path) -> list[str]:
    """Every file of the project as a path from ``root``: what git tracks, and what it would if asked."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def read_pages(root: Path) -> list[Page]:
    """Every Markdown page of the project but those that a program fills and puts elsewhere."""
    names = [name for name in tracked(root) if name.endswith(".md") and name not in TEMPLATES]
    return [Page(name, (root / name).read_text()) for name in names]
