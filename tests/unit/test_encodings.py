"""Every text file is read and written as UTF-8, whatever the locale says (``LC_ALL=C`` among others)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ingle

PACKAGE = Path(ingle.__file__).parent


def without_encoding(source: str) -> list[int]:
    """Lines of the calls that open a text file in the locale's encoding."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(attr="read_text" | "write_text"):
                mode = "r"
            case ast.Name(id="open") | ast.Attribute(attr="open", value=ast.Name(id="gzip" | "io")):
                mode = _mode(call, 1)
            case ast.Attribute(attr="fdopen"):
                mode = _mode(call, 1)
            case ast.Attribute(attr="open", value=value) if not (isinstance(value, ast.Name) and value.id == "os"):
                mode = _mode(call, 0)
            case _:
                continue
        if "b" not in mode and not any(keyword.arg == "encoding" for keyword in call.keywords):
            lines.append(call.lineno)
    return lines


def _mode(call: ast.Call, position: int) -> str:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[position : position + 1]
    return given[0].value if given and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else "r"


def test_no_file_is_opened_in_the_encoding_of_the_locale():
    found = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("p.read_text()", True),
        ("p.write_text('x')", True),
        ("p.open()", True),
        ("p.open('a')", True),
        ("open(p, mode='w')", True),
        ("gzip.open(p, 'rt')", True),
        ("p.read_text(encoding='utf-8')", False),
        ("p.open('rb')", False),
        ("open(p, 'w', encoding='utf-8')", False),
        ("os.open(p, flags)", False),
    ],
)
def test_what_counts(source, found):
    assert bool(without_encoding(source)) is found
