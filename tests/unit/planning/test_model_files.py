"""Where the planner finds models and data: folders, the hub's cache, shipped shapes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ingle.config import ModelConfig, NoAdapter, Run
from ingle.errors import HubUnavailable, ModelError
from ingle.planning.architecture import read_architecture
from ingle.planning.data_estimate import ASSUMED_ROWS, estimate_data
from ingle.planning.model_files import find_config, shipped_configs

SHAPES = json.loads((Path(__file__).parents[3] / "ingle" / "planning" / "shapes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", SHAPES, ids=[entry["ids"][0] for entry in SHAPES])
def test_shipped_shapes_have_the_published_number_of_parameters(entry: dict[str, Any]) -> None:
    found = read_architecture(entry["config"])
    assert found is not None
    assert found.shape(NoAdapter(kind="none")).num_parameters == entry["num_parameters"]


def test_names_of_shipped_shapes_are_unique() -> None:
    assert len(shipped_configs()) == sum(len(entry["ids"]) for entry in SHAPES)


def test_a_folder_comes_first_then_the_cache_then_shipped_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = ModelConfig(id="Qwen/Qwen3-8B")
    assert find_config(model) == (shipped_configs()["qwen/qwen3-8b"], "the shapes shipped with Ingle")
    repository = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text('{"model_type": "cached"}', encoding="utf-8")
    assert find_config(model) == ({"model_type": "cached"}, "the hub's cache")
    folder = tmp_path / "Qwen" / "Qwen3-8B"
    folder.mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_config(model)
    (folder / "config.json").write_text('{"model_type": "local"}', encoding="utf-8")
    assert find_config(model) == ({"model_type": "local"}, "its folder")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        find_config(model)


def test_an_unknown_model_is_refused_offline_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailable, match="did you mean qwen/qwen3-8b"):
        find_config(ModelConfig(id="Qwen/Qwen3-8C"))
    with pytest.raises(HubUnavailable, match="shape is shipped"):
        find_config(ModelConfig(id="nobody/has-this-one"))


def run_on(*paths: Path | str, **data: Any) -> Run:
    sources = [{"path": str(path)} for path in paths]
    return Run.model_validate({"model": {"id": "m"}, "data": {"sources": sources, **data}, "output": "o"})


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "jsonl.gz"])
def test_data_is_estimated_from_its_files(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "word " * 90} for _ in range(500)]
    text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    found, notes = estimate_data(run_on(path, packing=False))
    assert found.num_sequences == 500 and 70 * 500 < found.num_tokens < 130 * 500, "450 bytes are some 100 tokens"
    assert "about 500 rows" in notes[0]
    packed, _ = estimate_data(run_on(path, max_seq_len=512))
    assert packed.longest == 512 and packed.num_sequences == pytest.approx(packed.num_tokens / 512, rel=0.1)
    cut, _ = estimate_data(run_on(path, packing=False, max_seq_len=50))
    assert (cut.longest, cut.num_tokens) == (50, 50 * 500)


@pytest.mark.parametrize(("name", "options"), [("d.conll", {}), ("d.pos", {"lines": True})])
def test_rows_of_corpora_are_sentences_and_lines(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = tmp_path / name
    path.write_text("a O\nfox B-X\n\n" * 40 if name == "d.conll" else "a fine film\n" * 40, encoding="utf-8")
    source = {"path": str(path), **options}
    run = Run.model_validate({"model": {"id": "m"}, "data": {"sources": [source], "packing": False}, "output": "o"})
    assert estimate_data(run)[0].num_sequences == 40


def test_large_files_are_sampled(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    line = json.dumps({"text": "word " * 200}) + "\n"
    path.write_text(line * 20_000, encoding="utf-8")
    found, _ = estimate_data(run_on(path, packing=False))
    assert found.num_sequences == pytest.approx(20_000, rel=0.01)


def test_what_cannot_be_read_is_assumed_and_said() -> None:
    found, notes = estimate_data(run_on("someone/their-data", packing=False))
    assert found.num_sequences == ASSUMED_ROWS and "assumed" in notes[0]
    limited = Run.model_validate(
        {"model": {"id": "m"}, "data": {"sources": [{"path": "a/b", "limit": 7}], "packing": False}, "output": "o"}
    )
    assert estimate_data(limited)[0].num_sequences == 7
