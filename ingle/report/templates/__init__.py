"""The pages' templates: one file of HTML each, with styles inside, so that a page needs nothing but itself."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render(template: str, *styles: str, **values: Any) -> str:
    """A page.

    Args:
        template: Name of its HTML.
        styles: Names of its style sheets, given to the template as ``style``, one after the other.
        values: What else the template names; a name without a value is an error.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read(template)).render(style=Markup("".join(map(_read, styles))), **values)


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
