"""HTML templates and style sheets of pages; a page contains its styles and needs no other file.

``page.html`` has what every page has; the others fill its blocks.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, *styles: str, **values: Any) -> str:
    """Returns a page.

    Args:
        template: File name of the template.
        styles: File names of style sheets; joined, they are ``style`` in the template.
        values: Variables of the template; a missing one is an error.
    """
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(style=Markup("".join(map(_read, styles))), **values)


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
