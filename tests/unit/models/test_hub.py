"""Locating the files of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ingle.errors import ModelError
from ingle.models.loading import hub


def test_a_local_file_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x")
    assert hub.locate_file(str(path)) == path
    with pytest.raises(ModelError, match=r"There is no file .*nowhere\.gguf"):
        hub.locate_file(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(ModelError, match=r"There is no file model\.gguf"):
        hub.locate_file("model.gguf")


def test_a_run_folder_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(ModelError, match="is a run folder, not a model") as caught:
        hub.locate(str(tmp_path))
    assert f"ingle export {tmp_path}" in str(caught.value.fix)
    (tmp_path / "config.json").write_text("{}")
    assert hub.locate(str(tmp_path)) == tmp_path


def test_a_file_of_a_repository_is_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        for file in ("a-Q4_K_M.gguf", "big/a-00001-of-00003.gguf"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes(b"x")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert hub.locate_file("owner/name/a-Q4_K_M.gguf", revision="v1") == tmp_path / "a-Q4_K_M.gguf"
    assert hub.locate_file("owner/name/big/a-00001-of-00003.gguf") == tmp_path / "big/a-00001-of-00003.gguf"
    with pytest.raises(ModelError, match=r"owner/name on the hub contains no file other\.gguf"):
        hub.locate_file("owner/name/other.gguf")
    assert [(name, options["allow_patterns"], options["revision"]) for name, options in asked] == [
        ("owner/name", ["a-Q4_K_M.gguf"], "v1"),
        ("owner/name", ["big/a-*-of-00003.gguf"], None),
        ("owner/name", ["other.gguf"], None),
    ]
    assert all(options["ignore_patterns"] is None for _, options in asked)
