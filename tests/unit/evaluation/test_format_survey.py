"""The format survey: names and sizes of targets, and a whole survey of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, LlamaConfig

from ingle.config import ModelConfig
from ingle.errors import ConfigError, DataError, EvaluationError, QuantizationError
from ingle.evaluation.format_survey import SurveyRequest, find_target, survey, trial
from ingle.evaluation.format_survey.candidates import list_candidates
from ingle.events import Event, Progress, Warned
from ingle.models.loading.meta_device import build
from ingle.quant.imatrix_collector import linear_maps
from ingle.report.format_page import render_format_page
from ingle.report.format_results import Skipped
from tests.conftest import make_tokenizer
from tests.tiny import write_llama


@pytest.mark.parametrize(
    ("typed", "name", "container"),
    [
        ("q4_k_m", "q4_k_m", "gguf"),
        ("Q4_K_M", "q4_k_m", "gguf"),
        ("q4_k", "q4_k_m", "gguf"),
        ("nf4", "nf4", "safetensors"),
        ("hqq", "hqq-4", "safetensors"),
        ("hqq-3-g32", "hqq-3-g32", "safetensors"),
        ("bf16", "bf16", "gguf"),
    ],
)
def test_names_of_targets(typed: str, name: str, container: str) -> None:
    target = find_target(typed)
    assert (target.name, target.container) == (name, container)


@pytest.mark.parametrize(
    ("typed", "meant"), [("q4km", "q4_k_m"), ("nf5", "nf4"), ("hqq-5", "hqq-BITS"), ("hqq-4-g48", "hqq-BITS")]
)
def test_a_mistyped_name_gets_the_closest_one(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_target(typed, "--formats")
    assert meant in str(caught.value.fix) and f"--formats {typed}" in str(caught.value)


def test_a_format_that_is_only_read_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="cannot quantize weights to iq2_xs") as caught:
        find_target("iq2_xs")
    assert "long search" in str(caught.value.why)


def llama(hidden: int = 256) -> Any:
    return build(
        LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        ),
        torch.bfloat16,
    )


def test_sizes_are_those_of_the_tensors() -> None:
    model = llama()
    maps = [f"{name}.weight" for name in linear_maps(model)]
    found, left_out = list_candidates(model, maps, ["q8_0", "q4_k_m", "nf4", "int8", "hqq-2-g32"])
    assert left_out == []
    by_name = {candidate.name: candidate for candidate in found}
    linear = sum(model.get_parameter(name).numel() for name in maps)
    table, norms = 2 * 512 * 256, 5 * 256
    assert by_name["q8_0"].size_bytes == (linear + table) // 32 * 34 + 4 * norms
    assert by_name["int8"].size_bytes == linear + 4 * sum(model.get_parameter(n).shape[0] for n in maps) + 2 * (
        table + norms
    )
    assert by_name["hqq-2-g32"].size_bytes == linear // 4 + linear // 32 * 4 + 2 * (table + norms)
    assert by_name["q8_0"].types == {"q8_0": linear + table, "f32": norms}
    mix = by_name["q4_k_m"]
    assert mix.formats["lm_head.weight"].name == "q6_k" and mix.formats["model.embed_tokens.weight"].name == "q4_k"
    assert "model.embed_tokens.weight" not in by_name["nf4"].formats
    assert sum(mix.types.values()) == linear + table + norms


def test_rows_that_do_not_fill_blocks_fall_back() -> None:
    model = llama(hidden=96)
    maps = [f"{name}.weight" for name in linear_maps(model)]
    ((candidate,), _) = list_candidates(model, maps, ["q4_k_s"])
    by_map = {name: format.name for name, format in candidate.formats.items()}
    assert by_map["model.layers.0.self_attn.q_proj.weight"] == "q5_0"  # for q4_k
    assert by_map["model.layers.0.self_attn.v_proj.weight"] == "q5_1"  # for q5_k
    assert by_map["model.layers.1.mlp.down_proj.weight"] == "q4_k"  # rows of 512
    assert by_map["lm_head.weight"] == "q8_0"


def test_an_architecture_that_llama_cpp_does_not_know_has_safetensors_only() -> None:
    model = build(GPTJConfig(vocab_size=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=16), torch.float32)
    found, left_out = list_candidates(model, [f"{n}.weight" for n in linear_maps(model)], ["q4_0", "nf4"])
    assert [candidate.name for candidate in found] == ["nf4"] and left_out == ["q4_0"]


# --- a whole survey of a real tiny model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("model"),
        make_tokenizer(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"the quick brown fox number {i} jumps"}) + "\n" for i in range(30)))
    return path


def ask(folder: Path, text: Path, **options: Any) -> SurveyRequest:
    model = ModelConfig(id=str(folder), dtype="float32")
    return SurveyRequest(model, str(text), **{"names": ("q8_0", "q4_0", "nf4"), "num_tokens": 200, **options})


def test_the_report_has_every_key_of_its_json(folder: Path, text: Path, tmp_path: Path) -> None:
    found = survey(ask(folder, text, out=tmp_path / "out"))
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert json.loads((tmp_path / "out" / "formats.json").read_text()) == report
    assert set(report) == {
        *("schema", "status", "subject", "num_tokens", "num_windows", "limit", "reference", "formats", "front"),
        *("recommendation", "sayings", "skipped", "warnings"),
    }
    assert report["schema"] == 1 and report["status"] == "finished"
    assert set(report["subject"]) == {"model", "data", "imatrix", "dtype", "fingerprint"}
    assert set(report["recommendation"]) == {"name", "within", "reason"}
    assert set(report["sayings"][0]) == {"claim", "measured", "verdict"}
    assert 200 <= report["num_tokens"] < 230
    sizes = [each["size_bytes"] for each in report["formats"]]
    assert sizes == sorted(sizes) and {each["name"] for each in report["formats"]} == {"q8_0", "q4_0", "nf4"}
    for each in report["formats"]:
        assert set(each) == {
            *("name", "container", "types", "size_bytes", "bits_per_weight", "memory_bytes"),
            *("decode_weights_per_s", "encode_s", "quality"),
        }
        assert set(each["quality"]) == {"perplexity", "loss", "kl", "kl_99", "top_1"}
        assert set(each["quality"]["kl"]) == {"value", "low", "high"}
        assert each["decode_weights_per_s"] > 0 and each["quality"]["kl"]["value"] > 0
    assert report["reference"]["name"] == "none" and report["reference"]["quality"]["kl"]["value"] == 0
    assert report["recommendation"]["name"] in report["front"]
    page = (tmp_path / "out" / "formats.html").read_text()
    assert report["recommendation"]["name"] in page.split('class="choice"')[1][:40]


def test_a_survey_continues_where_it_was_stopped(folder: Path, text: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage.startswith("Measuring q4_0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(ask(folder, text, out=tmp_path / "out"), stop)
    stopped = json.loads((tmp_path / "out" / "formats.json").read_text())
    assert stopped["status"] == "unfinished" and [row["name"] for row in stopped["formats"]] == ["none", "q8_0"]
    stages: list[str] = []
    again = survey(ask(folder, text, out=tmp_path / "out"), lambda event: stages.append(getattr(event, "stage", "")))
    quantized = {stage.split()[2] for stage in stages if stage.startswith("Quantizing to ")}
    assert quantized == {"q4_0", "nf4"}
    kept = {row["name"]: row for row in (again.to_dict()["reference"], *again.to_dict()["formats"])}
    assert set(kept) == {"none", "q8_0", "q4_0", "nf4"}
    assert all(kept[row["name"]] == row for row in stopped["formats"])
    assert survey(ask(folder, text, out=tmp_path / "out")).formats == again.formats


def test_results_of_another_text_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    survey(ask(folder, text, names=("q8_0",), out=tmp_path / "out"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "what is two plus two? it is four"}\n')
    with pytest.raises(EvaluationError, match="another model, text"):
        survey(ask(folder, other, names=("q8_0",), out=tmp_path / "out"))


def test_a_folder_with_other_files_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        survey(ask(folder, text, out=tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        survey(ask(folder, text, out=tmp_path / "mine.txt"))
    (tmp_path / "bad").mkdir()
    for content in ("{}", "{", '{"subject": {}, "formats": []}'):
        (tmp_path / "bad" / "formats.json").write_text(content)
        with pytest.raises(EvaluationError, match="does not contain a comparison"):
            survey(ask(folder, text, names=("q8_0",), out=tmp_path / "bad"))


def test_a_missing_or_empty_text_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("missing.jsonl", "empty.jsonl"):
        with pytest.raises(DataError):
            survey(ask(folder, tmp_path / name))


def test_a_format_that_cannot_store_the_model_is_skipped_with_a_warning(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = trial._quantize

    def refuse_nf4(module: Any, format: Any, name: str, importance: Any) -> Any:
        if format.name == "nf4":
            raise QuantizationError("The weight is infinite.", where=name)
        return quantize(module, format, name, importance)

    monkeypatch.setattr(trial, "_quantize", refuse_nf4)
    events: list[Event] = []
    report = survey(ask(folder, text, names=("q8_0", "nf4")), events.append)
    assert [row.name for row in report.formats] == ["q8_0"]
    assert report.skipped == (Skipped("nf4", "The weight is infinite."),)
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert "nf4 cannot store this model: The weight is infinite." in warned
    assert "nf4 (The weight is infinite.)" in render_format_page(report)
