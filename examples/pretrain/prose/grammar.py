"""A small generative grammar: templates with choices, slots and inflected verbs.

The sentences live in ``grammar/*.txt``; this file turns them into text. A template holds

    [a|b|c]      one of several, nested as deep as wanted; an empty branch is allowed
    {key}        what the scene knows as ``key``, else a fresh pick from the lexicon section ``key``
    {x=key}      the same, remembered as ``x`` for the rest of the document
    {key+s}      the plural
    {key^}       with a capital letter
    {act:past}   a fresh action of the scene's domain in a verb form: base, past, s, ing, pp
    {hap:past}   the same for things that merely happen to one
    {x:past}     a remembered action in another form
    <mend>       inside an action: the verb that is inflected

Picks of one section are not repeated within a document while it has others to offer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from prose.inflection import inflect, plural, with_articles

Parts = tuple["str | Choice | Slot", ...]
Lexicon = Mapping[str, tuple[str, ...]]

GRAMMAR = Path(__file__).parents[1] / "grammar"
_OWNERS = {"act": "p", "actq": "q", "acti": "i", "actyou": "you", "actthey": "they", "actwe": "we"}
_HAPPENINGS = {"hap": "p", "hapq": "q", "hapi": "i"}
_POSSESSIVE = {"i": "my", "you": "your", "they": "their", "we": "our"}
_CAPITAL = re.compile(r"((?:^|\n|[.!?] |: (?=\"))\"?)([a-z])")
_SPOKEN = re.compile(r"\.(?=\" (?:said|asked|answered|called|cried|whispered)\b)")
_NEW_SENTENCE = re.compile(
    r"(?<=[.!?]\" )([hs]he|it|they)(?= (?!said|asked(?! the)|answered|cried|called|whispered|thought|told|sighed)\w)"
)
_SPACES = re.compile(r"  +| +(?=[,.;:!?\n])|(?<=\n) +")
_VERB = re.compile(r"<(\w+)>")


@dataclass(frozen=True, slots=True)
class Choice:
    """``[a|b]``."""

    branches: tuple[Parts, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """``{bind=key+s:form^}``."""

    key: str
    bind: str = ""
    form: str = ""
    is_plural: bool = False
    is_capital: bool = False


class GrammarError(ValueError):
    """A template that cannot be read, or a slot that nothing fills."""


def read_lexicon(paths: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Reads grammar files: ``== key`` starts a section of lines, ``:: key`` one of comma-separated words."""
    sections: dict[str, list[str]] = {}
    for path in paths:
        key, by_comma = "", False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.strip()
            if line.startswith(("== ", ":: ")):
                key, by_comma = line[3:].strip(), line.startswith("::")
                if key in sections:
                    raise GrammarError(f"{path.name}:{number}: section {key} is there twice")
                sections[key] = []
            elif line and not line.startswith("# "):
                items = (item.strip() for item in line.split(",")) if by_comma else (line,)
                sections[key].extend(item.replace("\\n", "\n") for item in items if item)
    return {key: tuple(items) for key, items in sections.items()}


@cache
def compile_template(template: str) -> Parts:
    """Parses a template once."""
    parts, end = _parse(template, 0, nested=False)
    assert end == len(template)
    return parts


def _parse(text: str, at: int, *, nested: bool) -> tuple[Parts, int]:
    parts: list[str | Choice | Slot] = []
    while at < len(text):
        char = text[at]
        if char in "|]" and nested:
            break
        if char == "[":
            branches = []
            while True:
                branch, at = _parse(text, at + 1, nested=True)
                branches.append(branch)
                if at >= len(text):
                    raise GrammarError(f"unclosed [ in: {text}")
                if text[at] == "]":
                    break
            parts.append(Choice(tuple(branches)))
            at += 1
        elif char == "{":
            end = text.index("}", at)
            parts.append(_slot(text[at + 1 : end]))
            at = end + 1
        else:
            end = at
            while end < len(text) and text[end] not in ("[|]{" if nested else "[{"):
                end += 1
            parts.append(text[at:end])
            at = end
    return tuple(parts), at


def _slot(body: str) -> Slot:
    is_capital, body = body.endswith("^"), body.removesuffix("^")
    body, _, form = body.partition(":")
    is_plural, body = body.endswith("+s"), body.removesuffix("+s")
    bind, _, key = body.rpartition("=")
    return Slot(key, bind, form, is_plural, is_capital)


class Scene:
    """One document in the making: its random numbers, and what its slots already mean."""

    def __init__(self, rng: Random, lexicon: Lexicon, domain: str = "") -> None:
        """Starts a document; ``domain`` is where ``{act}`` and the ``here.*`` sections come from."""
        self.rng = rng
        self.random = rng.random
        self.lexicon = lexicon
        self.domain = domain
        self.values: dict[str, str] = {}
        self._used: set[tuple[str, str]] = set()

    def __getitem__(self, key: str) -> str:
        """What a slot means."""
        return self.values[key]

    def __setitem__(self, key: str, value: str) -> None:
        """Fixes what a slot means for the rest of the document."""
        self.values[key] = value

    def choose(self, key: str) -> str:
        """A raw template of a section, not used in this document before if there is one."""
        options = self.lexicon[key]
        item = options[int(self.random() * len(options))]
        for _ in range(4):
            if (key, item) not in self._used:
                break
            item = options[int(self.random() * len(options))]
        self._used.add((key, item))
        return item

    def pick(self, key: str) -> str:
        """A filled entry of a section, before the final touch."""
        return self._fill(self.choose(key))

    def action(self, who: str = "p", section: str = "act") -> str:
        """A fresh action of the domain with its slots filled and its verbs still marked."""
        owner = _POSSESSIVE.get(who) or self.values[f"{who}.his"]
        before = self.values.get("his")
        self.values["his"] = owner
        key = f"{self.domain}.{section}"
        text = self.pick(key if key in self.lexicon else f"{self.domain}.act")
        if before is None:
            del self.values["his"]
        else:
            self.values["his"] = before
        return text

    def write(self, template: str) -> str:
        """Fills a template and gives it the final touch: articles, spaces, capitals."""
        return polish(self._fill(template))

    def section(self, key: str) -> str:
        """Picks from a section and gives it the final touch."""
        return polish(self.pick(key))

    def _fill(self, template: str) -> str:
        out: list[str] = []
        self._render(compile_template(template), out)
        return "".join(out)

    def _render(self, parts: Parts, out: list[str]) -> None:
        for part in parts:
            if part.__class__ is str:
                out.append(part)  # type: ignore[arg-type]
            elif part.__class__ is Choice:
                branches = part.branches  # type: ignore[union-attr]
                self._render(branches[int(self.random() * len(branches))], out)
            else:
                out.append(self._value(part))  # type: ignore[arg-type]

    def _value(self, slot: Slot) -> str:
        key = slot.key
        if slot.form and key in _OWNERS:
            text = self.action(_OWNERS[key])
        elif slot.form and key in _HAPPENINGS:
            text = self.action(_HAPPENINGS[key], "happen")
        else:
            known = self.values.get(key)
            if known is not None:
                text = known
            elif key.startswith("here."):
                text = self.pick(self.domain + key[4:])
            elif key in self.lexicon:
                text = self.pick(key)
            else:
                raise GrammarError(f"nothing fills {{{key}}}")
        if slot.bind:
            self.values[slot.bind] = text
        if slot.form:
            text = conjugate(text, slot.form)
        if slot.is_plural:
            text = plural(text)
        return text[:1].upper() + text[1:] if slot.is_capital else text


@cache
def _verb(verb: str, form: str) -> str:
    return inflect(verb, form)


def conjugate(action: str, form: str) -> str:
    """Puts the marked verbs of an action into a form."""
    return _VERB.sub(lambda match: _verb(match[1], form), action)


def polish(text: str) -> str:
    """Articles by sound, single spaces, a capital at the start of every sentence and quotation."""
    text = _SPACES.sub(lambda match: " " if match[0].endswith("  ") and match.end() < len(text) else "", text)
    text = with_articles(text)
    text = _SPOKEN.sub(",", text)
    text = _NEW_SENTENCE.sub(lambda match: match[0].capitalize(), text)
    return _CAPITAL.sub(lambda match: match[1] + match[2].upper(), text).strip()
