"""Compares answers with references: spelling, numbers, words."""

from __future__ import annotations

import re
import string
from decimal import Decimal

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
#: What may stand inside of a number: LaTeX's spelling of a separator, and the sign of a currency behind a minus.
_LATEX_COMMA, _CURRENCY = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)"), re.compile(r"(?<=[-+])\s?[$£€¥]\s?(?=[\d.])")
#: A number inside a text. A minus behind a digit, a letter or a bracket is an operator or a hyphen, not a sign.
_INSIDE = re.compile(r"(?:(?<![\w)\]])[-+])?(?:\d+(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d{1,3}\b)?")


def collapse(text: str) -> str:
    """Returns the text with each run of white space as one space, and none at the ends."""
    return " ".join(text.split())


def normalize_number(text: str) -> str:
    """Returns one spelling for each number (``$1,000.00`` and ``1000`` are equal); other text is unchanged."""
    bare = _THOUSANDS.sub("", text).lstrip("$£€¥ ").rstrip()
    if not _NUMBER.fullmatch(bare):
        return text
    number = Decimal(bare).normalize()
    return "0" if number == 0 else f"{number:f}"


def normalize(text: str) -> str:
    """Returns the text in lower case, without ASCII punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def last_number(text: str) -> Decimal | None:
    """Returns the last number of a text, which may have separators between thousands; None without one."""
    found = _INSIDE.findall(_plain(text))
    return Decimal(found[-1]) if found else None


def first_number(text: str) -> Decimal | None:
    """Returns the first number of a text; None without one."""
    found = _INSIDE.search(_plain(text))
    return Decimal(found[0]) if found else None


def _plain(text: str) -> str:
    """Returns a text with its numbers spelled as in Python: no separators, a plain minus next to the digits."""
    text = _LATEX_COMMA.sub(",", text.replace("\N{MINUS SIGN}", "-"))
    return _THOUSANDS.sub("", _CURRENCY.sub("", text))
