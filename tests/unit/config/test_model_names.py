from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config.model_names import check_name, missing, nearest_path
from ingle.errors import ModelError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "runs/demo/run.yaml",
        "runs/demo/adapter/adapter_config.json",
        "runs/demo/adapter/adapter_model.safetensors",
        "runs/short/run.yaml",
        "model/config.json",
        "files/a.gguf",
        "full/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "runs/demo",
        "./runs/demo/",
        "runs/demo/adapter",
        "model",
        "files/a.gguf",
        "Qwen/Qwen3-0.6B",
        "gpt2",
        "owner/name/some-Q4_K_M.gguf",
    ],
)
def test_names_that_may_exist_pass(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/dmeo", "There is no folder runs/dmeo.\n  fix    did you mean runs/demo?"),
        ("rnus/demo", None),  # may be a hub id
        ("full/gpt2", None),
        ("model-large", None),
        ("rnus/demo/adapter", "did you mean runs/demo/adapter?"),
        ("dmeo", "did you mean runs/demo?"),
        ("modle", "did you mean model?"),
        ("./nope", "name a run folder (run.yaml), an adapter folder (adapter_config.json), a model folder"),
        ("./nope", "the runs in this folder are runs/demo, runs/short"),
        ("runs/nothing-like-it", "There is no folder runs/nothing-like-it."),
        ("files/b.gguf", "There is no file files/b.gguf.\n  fix    did you mean files/a.gguf?"),
        ("runs", "runs is not a run or model, but contains some.\n  fix    name one of them: runs/demo, runs/short"),
        (".", "name one of them: model"),
        ("files", "files is a folder, but a GGUF model is a file.\n  fix    name the file: files/a.gguf"),
        ("empty", "empty contains no run and no model.\n  why    it is empty"),
        ("full", "it has none of run.yaml, adapter_config.json, config.json"),
        ("full/notes.txt", "full/notes.txt is not a model"),
        ("runs/demo/adapter/adapter_model.safetensors", "name its folder runs/demo/adapter"),
        ("x" * 300, "cannot be opened"),
        ("a b", "There is no folder a b."),
        ("", "The name of the model is empty."),
    ],
)
def test_names_that_cannot_exist_are_refused_with_a_suggestion(name: str, said: str | None) -> None:
    if said is None:
        check_name(name)
        return
    with pytest.raises(ModelError) as caught:
        check_name(name)
    assert said in str(caught.value) and "hub cannot" not in str(caught.value)


def test_the_error_of_a_missing_folder_mentions_hub_ids() -> None:
    error = str(missing("nope"))
    assert error.startswith("There is no folder nope.") and "OWNER/NAME" in error


def test_nearest_path_searches_folder_by_folder(folder: Path) -> None:
    assert nearest_path("Full/Notes.txt") == "full/notes.txt"
    assert nearest_path(folder / "rus" / "demo" / "run.yml") == str(folder / "runs" / "demo" / "run.yaml")
    assert nearest_path("zzz/notes.txt") is nearest_path("full/zzz") is nearest_path("full/notes.txt/x") is None
