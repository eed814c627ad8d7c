"""Checks the documentation against the code: ``python -m docs.check``.

Each check yields one line per problem, so that a run shows all of them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from os.path import dirname, join, normpath
from pathlib import Path

from docs import commands, generate
from docs.markdown import Page, read_pages, tracked

ROOT = Path(__file__).resolve().parent.parent
README_LINES = 200

# Character classes of one letter keep this file from matching itself.
LEAKS = (
    (
        re.compile(r"(?<![\w.])/(?:wor[k]|roo[t]|hom[e]/\w+|tm[p]/(?:brie[f]|ven[v]))/"),
        "a path of one machine",
    ),
    (re.compile(r"\b(?:pyp[i]|pythonhoste[d]|anacond[a])\.org"), "the host of a package registry"),
    (re.compile(r"\bdownloa[d]\.pytorch\.org|\bpyp[i]-\w+\.|/simpl[e]/"), "the host of a package registry"),
)
PLACEHOLDER = re.compile(r"\bFIL[L]\b|\bTOD[O]\b|\bFIXM[E]\b|\bXX[X]\b")
TEXT = (".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".cfg", ".html", ".j2", "Makefile", "run")


def stale_pages(root: Path) -> Iterator[str]:
    """Yields generated pages that are out of date."""
    reference = root / "docs" / "reference"
    expected = generate.pages()
    for name, text in expected.items():
        path = reference / name
        if not path.is_file() or path.read_text() != text:
            yield f"docs/reference/{name}: out of date; run `make docs`"
    for path in sorted(reference.glob("*.md")):
        if path.name not in expected and path.name != "index.md":
            yield f"docs/reference/{path.name}: not a generated page"


def undocumented() -> Iterator[str]:
    """Yields options and commands without a description; the linter checks the docstrings of errors and formats."""
    for option in generate.options():
        if not option.description and not _is_section(option.path):
            yield f"option {option.path}: no description under Attributes of its section"
    for path, command in generate.commands():
        if not (command.help or "").strip():
            yield f"command `{path}`: no help"
        for parameter in command.params:
            if not (getattr(parameter, "help", None) or "").strip():
                yield f"command `{path}`: {parameter.name} has no help"


def _is_section(path: str) -> bool:
    return any(other.path.startswith(path + ".") for other in generate.options())


def dead_links(pages: list[Page], root: Path) -> Iterator[str]:
    """Yields relative links to missing files or headings, and pages that no page links to."""
    by_name = {page.name: page for page in pages}
    linked = set()
    for page in pages:
        for line, target in page.links:
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            name = normpath(join(dirname(page.name), path)) if path else page.name
            linked.add(name)
            if not (root / name).exists():
                yield f"{page.name}:{line}: links to {target}, which does not exist"
            elif anchor and (name not in by_name or anchor not in by_name[name].anchors):
                yield f"{page.name}:{line}: links to {target}, but {name} has no such heading"
    for page in pages:
        if page.name.startswith("docs/") and page.name != "docs/index.md" and page.name not in linked:
            yield f"{page.name}: no page links here"


def placeholders(pages: list[Page]) -> Iterator[str]:
    """Yields placeholders for missing text."""
    for page in pages:
        for number, line in enumerate(page.text.splitlines(), 1):
            if match := PLACEHOLDER.search(line):
                yield f"{page.name}:{number}: {match[0]} marks missing text"


def long_readme(pages: list[Page]) -> Iterator[str]:
    """Yields a README of more than :data:`README_LINES` lines."""
    for page in pages:
        length = len(page.text.splitlines())
        if page.name == "README.md" and length > README_LINES:
            yield f"README.md: {length} lines; at most {README_LINES}"


def leaks(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Yields paths and registry hosts that exist only on one machine."""
    for name in names:
        if not name.endswith(TEXT) and not name.startswith(".ci/"):
            continue
        for number, line in enumerate((root / name).read_text(errors="replace").splitlines(), 1):
            for pattern, what in LEAKS:
                if match := pattern.search(line):
                    yield f"{name}:{number}: {match[0]!r} is {what}"


def silent_raises(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Yields public functions that raise an error of Ingle without documenting it; docstrings of commands are help."""
    for name in names:
        if not (name.startswith("ingle/") and name.endswith(".py")) or name.startswith("ingle/cli/"):
            continue
        for function in _public_functions(ast.parse((root / name).read_text())):
            raised = sorted(set(_raised(function)))
            if raised and "Raises:" not in (ast.get_docstring(function) or ""):
                yield f"{name}:{function.lineno}: {function.name} raises {', '.join(raised)} without `Raises:`"


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _public_functions(tree: ast.Module) -> Iterator[Function]:
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield inner


def _raised(function: Function) -> Iterator[str]:
    kinds = {name for name, kind in vars(generate.errors).items() if isinstance(kind, type)}
    for node in ast.walk(function):
        called = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in kinds:
            yield called.id


def missing_files(pages: Iterable[Page], root: Path) -> Iterator[str]:
    """Yields Python files that a page names and that do not exist, from the root or from ``ingle/``."""
    for page in pages:
        for file in re.findall(r"`((?:[\w-]+/)+\w+\.py)`", page.text) if page.name != "CHANGELOG.md" else ():
            if not (root / file).is_file() and not (root / "ingle" / file).is_file():
                yield f"{page.name}: names {file}, which is not there"


def dead_references(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Yields references of docstrings (``:func:`ingle.a.b```) to modules or names that do not exist."""
    for name in names:
        if not (name.startswith("ingle/") and name.endswith(".py")):
            continue
        for target in re.findall(r":\w+:`~?(ingle(?:\.\w+)+)`", (root / name).read_text()):
            parts = target.split(".")
            places = [root.joinpath(*parts[:end]) for end in range(len(parts), 0, -1)]
            files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
            file = next(file for file in files if file.is_file())
            rest = parts[len((file.parent if file.name == "__init__.py" else file).relative_to(root).parts) :]
            if rest and not re.search(rf"\b{rest[0]}\b", file.read_text()):
                yield f"{name}: refers to {target}, which is not there"


def unpinned(root: Path) -> Iterator[str]:
    """Yields lines of constraints.txt that are not a name and a version."""
    for number, line in enumerate((root / "constraints.txt").read_text().splitlines(), 1):
        if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.!]*", line):
            yield f"constraints.txt:{number}: {line!r} is not NAME==VERSION"


def problems(root: Path = ROOT) -> Iterator[str]:
    """Yields every problem of the documentation under ``root``."""
    names, pages = tracked(root), read_pages(root)
    yield from stale_pages(root)
    yield from undocumented()
    yield from dead_links(pages, root)
    yield from placeholders(pages)
    yield from long_readme(pages)
    yield from commands.wrong_blocks(pages, root)
    yield from leaks(root, names)
    yield from silent_raises(root, names)
    yield from missing_files(pages, root)
    yield from dead_references(root, names)
    yield from unpinned(root)


def main() -> int:
    """Prints every problem; returns 1 if there is any."""
    found = list(problems())
    for problem in found:
        print(problem)
    print(f"docs: {len(found)} problems" if found else "docs: no problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
