"""Loads the example scripts, which are no package, under names of their own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def load(path: Path) -> ModuleType:
    """The script as a module; what it adds to ``sys.path`` is taken away again by the caller's fixture."""
    name = f"example_{path.parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of the examples."""
    return EXAMPLES


@pytest.fixture(scope="session")
def corpus_script() -> ModuleType:
    """``examples/pretrain/make_corpus.py``."""
    before = list(sys.path)
    try:
        return load(EXAMPLES / "pretrain" / "make_corpus.py")
    finally:
        sys.path[:] = before


@pytest.fixture(scope="session")
def task_script() -> ModuleType:
    """``examples/demo/make_task.py``."""
    return load(EXAMPLES / "demo" / "make_task.py")


@pytest.fixture(scope="session")
def orders_script() -> ModuleType:
    """``examples/own-data/make_orders.py``."""
    return load(EXAMPLES / "own-data" / "make_orders.py")


@pytest.fixture(scope="session")
def labelled_script() -> ModuleType:
    """``examples/make_labelled.py``."""
    return load(EXAMPLES / "make_labelled.py")


@pytest.fixture(scope="session")
def sums_script() -> ModuleType:
    """``examples/align/make_sums.py``."""
    return load(EXAMPLES / "align" / "make_sums.py")
