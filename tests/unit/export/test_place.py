"""Exports overwrite nothing and are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ingle.errors import ConfigError, DoesNotFit
from ingle.export.place import Place


def test_a_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    place = Place(tmp_path / "new", "model")
    with place.opened() as partial:
        (partial / "model.gguf").write_bytes(b"x")
        assert not (tmp_path / "new").exists()
    assert place.result == tmp_path / "new" / "model.gguf"
    assert place.result.read_bytes() == b"x"
    assert os.listdir(tmp_path) == ["new"]


def test_a_file_and_its_companions_lie_side_by_side(tmp_path: Path) -> None:
    place = Place(tmp_path / "deep" / "model.gguf", "ignored")
    with place.opened() as partial:
        (partial / "model.gguf").write_bytes(b"x")
        (partial / "README.md").write_text("card")
    assert sorted(os.listdir(tmp_path / "deep")) == ["README.md", "model.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", ["new", "new.gguf"])
def test_what_is_interrupted_leaves_nothing(tmp_path: Path, error: type[BaseException], name: str) -> None:
    place = Place(tmp_path / name, "model")
    with pytest.raises(error), place.opened() as partial:
        (partial / "model.gguf").write_bytes(b"x")
        raise error
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("x")
    with pytest.raises(ConfigError, match="overwrites nothing") as caught:
        Place(tmp_path / "old", "model")
    assert "old-2" in str(caught.value)


def test_a_readme_of_another_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="overwrites nothing"):
        Place(tmp_path / "model.gguf", "model")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with Place(tmp_path / "empty", None).opened() as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "empty" / "a").is_file()


def test_a_folder_of_files_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        Place(tmp_path / "x.gguf", None)


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "new.partial-1"
    left.mkdir()
    with Place(tmp_path / "new", None).opened() as partial:
        (partial / "a").write_text("x")
    assert os.listdir(tmp_path) == ["new"]


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="of disk"):
        Place(tmp_path / "new", None).require_bytes(1 << 60)
