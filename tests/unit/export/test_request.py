"""What is asked of an export is checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config.base import NoBase
from ingle.errors import ConfigError, ModelError
from ingle.export.gguf_types import choose_type
from ingle.export.hf import choose_layout
from ingle.export.request import require_file, require_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, an empty folder and a text."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "run.yaml").touch()
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "held-out.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/dmeo", "did you mean runs/demo?"),
        ("runs", "did you mean runs/demo?"),
        ("runs/empty", "it holds nothing"),
        ("rnus", "did you mean runs?"),
        ("runs/else", "check the path"),
        ("/nowhere/at/all", "There is no /nowhere/at/all."),
    ],
)
def test_a_path_that_is_no_model_is_not_looked_for_on_the_hub(here: Path, path: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        require_model(path)
    assert words in str(caught.value) and "hub" not in str(caught.value)


@pytest.mark.parametrize("path", ["runs/demo", "gpt2", "Qwen/Qwen3-0.6B", "owner/name/file.gguf"])
def test_runs_and_ids_pass(here: Path, path: str) -> None:
    (here / "Qwen").mkdir()  # may hold other models of the same owner
    require_model(path)


def test_a_missing_file_is_told_with_the_nearest_name(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data heldout\.jsonl") as caught:
        require_file(Path("heldout.jsonl"), "--data")
    assert caught.value.fix == "did you mean held-out.jsonl?"


@pytest.mark.parametrize(
    ("typed", "fix"), [("q4km", "q4_k_m?"), ("astrained", "as-trained?"), ("nf4", "--to safetensors --type nf4")]
)
def test_a_wrong_type_of_gguf_is_told_what_was_meant(typed: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_type(typed, NoBase())
    assert str(caught.value.fix).endswith(fix)


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        ("bf61", "did you mean bf16?"),
        ("q4km", "did you mean --to gguf --type q4_k_m?"),
        ("q4_k_m", "--to gguf --type q4_k_m"),
    ],
)
def test_a_wrong_type_of_safetensors_is_told_what_was_meant(typed: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_layout(typed, NoBase())
    assert caught.value.fix == fix
