"""Messages in the source follow decision 0018: sentences, fragments and stages have one form each."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle import errors

ROOT = Path(errors.__file__).parent
#: What is checked: the folders and files of the package.
CHECKED = sorted(path.name for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
ERRORS = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.Explained)}
FRAGMENTS = ("where", "why", "fix")


def _ends(node: ast.expr | None) -> tuple[str, str] | None:
    """Returns the first and last piece of a text, empty for interpolated values; None for other expressions."""
    match node:
        case ast.Constant(value=str(text)):
            return text, text
        case ast.JoinedStr(values=[first, *_] as values):
            pieces = [piece.value if isinstance(piece, ast.Constant) else "" for piece in (first, values[-1])]
            return str(pieces[0]), str(pieces[1])
    return None


def _starts_like_a_sentence(text: str) -> bool:
    word = text.split(" ")[0]
    return not text or not text[0].isalpha() or text[0].isupper() or any(mark in word for mark in "._/")


def violations(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and reason of every message that has the wrong form."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        message = _ends(call.args[0]) if call.args else None
        if name in ERRORS | {"Problem", "Warned"} and message is not None:
            if not _starts_like_a_sentence(message[0]):
                yield call.lineno, f"starts with a lower-case word: {message[0]}"
            if message[1] and message[1][-1] not in ".?":
                yield call.lineno, f"has no full stop: {message[1]}"
        if name == "Progress" and message is not None and not _starts_like_a_sentence(message[0]):
            yield call.lineno, f"starts with a lower-case word: {message[0]}"
        if name in ERRORS:
            for keyword in call.keywords:
                text = _ends(keyword.value) if keyword.arg in FRAGMENTS else None
                if text is not None and text[1].endswith(".") and not text[1].endswith("..."):
                    yield call.lineno, f"{keyword.arg} ends with a full stop: {text[1]}"


@pytest.mark.parametrize("part", CHECKED)
def test_messages_have_one_form(part: str) -> None:
    found = []
    for path in sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / part]:
        found += [f"{path.name}:{line} {reason}" for line, reason in violations(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("source", "reasons"),
    [
        ("ConfigError('The file is empty.', fix='add a row')", 0),
        ("ConfigError(f'{name} is not an option.', fix=f'did you mean {near}?')", 0),
        ("ConfigError('--top-p must be above 0.')", 0),
        ("errors.DataError('no rows', fix='Add a row.')", 3),
        ("Warned(f'rows were dropped: {count}')", 1),
        ("Progress('reading weights', 0, 1)", 1),
    ],
)
def test_violations_are_found(source: str, reasons: int) -> None:
    assert len(list(violations(source))) == reasons
