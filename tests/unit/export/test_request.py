"""Options of an export are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config.base import NoBase
from ingle.errors import ConfigError
from ingle.export.request import require_file
from ingle.export.writers.gguf_types import choose_type
from ingle.export.writers.safetensors_folder import choose_layout


def test_the_nearest_name_is_suggested_for_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held-out.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--data heldout\.jsonl") as caught:
        require_file(Path("heldout.jsonl"), "--data")
    assert caught.value.fix == "did you mean held-out.jsonl?"


@pytest.mark.parametrize(
    ("typed", "fix"), [("q4km", "q4_k_m?"), ("astrained", "as-trained?"), ("nf4", "--to safetensors --type nf4")]
)
def test_a_type_is_suggested_for_an_unknown_gguf_type(typed: str, fix: str) -> None:
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
def test_a_type_is_suggested_for_an_unknown_safetensors_type(typed: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_layout(typed, NoBase())
    assert caught.value.fix == fix
