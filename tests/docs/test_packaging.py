"""The declared dependencies are those that are imported, and all are pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

from docs.check import ROOT

PROJECT = tomllib.loads((Path(ROOT) / "pyproject.toml").read_text())["project"]
#: Import names of distributions, where they differ.
IMPORTED_AS = {
    "llama_cpp_python": "llama_cpp",
    "pyyaml": "yaml",
    "scikit_learn": "sklearn",
    "markdown_it_py": "markdown_it",
}
#: Modules that another distribution installs in the version it needs.
PART_OF = {"pydantic_core": "pydantic", "llvmlite": "numba", "markupsafe": "jinja2"}
#: Triton comes with torch on machines with a GPU; hqq reads an export if the user has it.
OPTIONAL = {"triton", "hqq"}


def imports(folder: str) -> set[str]:
    found = set()
    for path in (Path(ROOT) / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
                found.add(ast.literal_eval(node.args[0]).split(".")[0])  # an oracle of the tests
    found = {PART_OF.get(name, name) for name in found}
    return found - set(sys.stdlib_module_names) - {"ingle", "docs", "benchmarks"}


def names(requirements: list[str]) -> set[str]:
    plain = {re.split(r"[<>=~!\[; ]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in plain}


def test_every_imported_library_is_declared_and_used() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names(PROJECT["dependencies"])
    used = imports("ingle")
    of_extras = [line for name, lines in extras.items() if name not in ("test", "dev") for line in lines]
    optional = names(of_extras) | OPTIONAL
    assert used - declared - optional == set()
    assert declared - used == set()


def test_tests_and_docs_import_only_declared_libraries() -> None:
    allowed = (
        names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
        | OPTIONAL
        | {"tests", "conftest", "trl"}  # trl: only to compute golden values anew
    )
    assert imports("tests") - allowed == set()
    assert imports("docs") - allowed == set()


def test_every_dependency_is_pinned() -> None:
    pinned = names((Path(ROOT) / "constraints.txt").read_text().splitlines())
    extras = PROJECT["optional-dependencies"]
    wanted = names(PROJECT["dependencies"] + extras["test"]) | {"ruff", "mypy", "import_linter"}
    assert wanted - {IMPORTED_AS.get(name, name) for name in pinned} == set()
