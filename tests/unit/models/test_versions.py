"""A transformers that is too old is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ingle.errors import DependencyError
from ingle.models.versions import OLDEST_TRANSFORMERS, check_transformers


def test_versions() -> None:
    for version in ("5.4.0", "5.23.0", "5.30.0.dev0", "6.0.0rc1"):
        check_transformers(version)
    for version in ("4.57.1", "5.3.9"):
        with pytest.raises(DependencyError, match=f"transformers {version} is too old"):
            check_transformers(version)


def test_the_package_requires_the_same_version() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert f"transformers>={'.'.join(map(str, OLDEST_TRANSFORMERS))},<6" in project["dependencies"]
