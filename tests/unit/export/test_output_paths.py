"""Exports overwrite nothing and leave no incomplete files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ingle.errors import ConfigError, DoesNotFit
from ingle.export.output_paths import OutputPaths


def test_a_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path / "new", None)
    with paths.opened() as partial:
        (partial / "model.safetensors").write_bytes(b"x")
        assert not (tmp_path / "new").exists()
    assert paths.result == tmp_path / "new" and os.listdir(paths.result) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("out", ["deep/model.gguf", "deep"])
def test_companions_are_named_after_the_file(tmp_path: Path, out: str) -> None:
    paths = OutputPaths(tmp_path / out, "model")
    with paths.opened() as partial:
        (partial / "model.gguf").write_bytes(b"x")
        (partial / paths.name("card")).write_text("card")
        assert not paths.result.exists()
    assert sorted(os.listdir(tmp_path / "deep")) == ["model.gguf", "model.md"]
    assert paths.files() == {"model": str(tmp_path / "deep/model.gguf"), "card": str(tmp_path / "deep/model.md")}


@pytest.mark.parametrize("is_file", [True, False])
def test_two_exports_share_a_folder(tmp_path: Path, is_file: bool) -> None:
    for stem in ("a.q4_k_m", "a.q8_0"):
        paths = OutputPaths(tmp_path / f"{stem}.gguf" if is_file else tmp_path, stem)
        with paths.opened() as partial:
            for name in (str(paths.main), paths.name("certificate"), paths.name("modelfile")):
                (partial / name).write_text(stem)
    kinds = ("Modelfile", "certificate.json", "gguf")
    assert sorted(os.listdir(tmp_path)) == sorted(f"{stem}.{kind}" for stem in ("a.q4_k_m", "a.q8_0") for kind in kinds)
    assert (tmp_path / "a.q8_0.certificate.json").read_text() == "a.q8_0"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize(("name", "stem"), [("new", None), ("new", "model"), ("a/b/new.gguf", "model")])
def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, error: type[BaseException], name: str, stem: str | None
) -> None:
    paths = OutputPaths(tmp_path / name, stem)
    with pytest.raises(error), paths.opened() as partial:
        (partial / "model.gguf").write_bytes(b"x")
        raise error
    assert os.listdir(tmp_path) == []


def test_interruption_between_two_files_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    paths = OutputPaths(tmp_path / "m.gguf", "m")
    move = os.replace

    def stop_at_the_last(source: Path, target: Path) -> None:
        if Path(target).name == "m.gguf":
            raise KeyboardInterrupt
        move(source, target)

    with pytest.raises(KeyboardInterrupt), paths.opened() as partial:
        (partial / "m.gguf").write_bytes(b"x")
        (partial / "m.md").write_text("card")
        monkeypatch.setattr(os, "replace", stop_at_the_last)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("x")
    with pytest.raises(ConfigError, match="nothing is overwritten") as caught:
        OutputPaths(tmp_path / "old", None)
    assert "old-2" in str(caught.value)
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        OutputPaths(tmp_path / "old" / "file", "model")


@pytest.mark.parametrize("name", ["model.gguf", "model.md", "model.certificate.json"])
def test_a_file_of_another_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten") as caught:
        OutputPaths(tmp_path / "model.gguf", "model")
    assert f"--out {tmp_path / 'model-2.gguf'}" in str(caught.value)


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path / "model.gguf", "model")
    with pytest.raises(ConfigError, match="nothing is overwritten"), paths.opened() as partial:
        (partial / "model.gguf").write_text("ours")
        (tmp_path / "model.gguf").write_text("theirs")
    assert (tmp_path / "model.gguf").read_text() == "theirs" and os.listdir(tmp_path) == ["model.gguf"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with OutputPaths(tmp_path / "empty", None).opened() as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "empty" / "a").is_file()


def test_an_export_folder_cannot_be_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        OutputPaths(tmp_path / "x.gguf", None)


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    ended, running = 1 << 30, os.getppid()
    for number in (ended, running):
        (tmp_path / f"new.partial-{number}").mkdir()
    with OutputPaths(tmp_path / "new", None).opened() as partial:
        (partial / "a").write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["new", f"new.partial-{running}"]


def test_scratch_folders_lie_next_to_the_result_and_are_removed(tmp_path: Path) -> None:
    with OutputPaths(tmp_path / "m.gguf", "m").scratch() as folder:
        assert folder.parent == tmp_path and folder.name.startswith("m.gguf.partial-")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="of disk"):
        OutputPaths(tmp_path / "new", None).require_bytes(1 << 60)
