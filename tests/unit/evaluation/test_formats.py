"""Choosing a format: names, sizes, the front, the recommendation, the page, and the command."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, LlamaConfig

from ingle.cli.formats import _render
from ingle.config import ModelConfig
from ingle.errors import ConfigError, DataError, EvaluationError
from ingle.evaluation.formats import Survey, find_target, survey
from ingle.evaluation.formats.candidates import list_candidates
from ingle.evaluation.formats.chart import Axes, Dot, size_chart
from ingle.evaluation.formats.choice import pareto_front, recommend, sayings, warnings
from ingle.evaluation.formats.page import render_page
from ingle.evaluation.formats.result import Estimate, FormatResult, Quality
from ingle.events import Warned
from ingle.models.loading.meta_device import build
from ingle.quant.imatrix_collector import linear_maps
from tests.tiny import write_llama


def row(name: str, size: int, kl: float, loss: float | None = None, spread: float = 0.0) -> FormatResult:
    figure = Estimate(kl, kl - spread, kl + spread)
    rise = Estimate(kl if loss is None else loss, None, None)
    quality = Quality(Estimate(5.0, 4.9, 5.1), rise, figure, 5 * kl, Estimate(0.9, 0.88, 0.92))
    return FormatResult(name, "gguf", {name: 100}, size, size * 8 / 100, 2 * size, 1e9, 0.5, quality)


ROWS = [
    row("q8_0", 110, 0.001),
    row("q4_0", 60, 0.05),
    row("q4_k_m", 62, 0.012),
    row("q4_k_s", 59, 0.03),
    row("nf4", 70, 0.04),
]


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto_front(ROWS) == ["q4_k_s", "q4_k_m", "q8_0"]
    assert pareto_front([row("a", 10, 0.1), row("b", 10, 0.05)]) == ["b"]
    assert pareto_front([]) == []


def test_the_smallest_within_the_limit_is_recommended() -> None:
    choice = recommend(ROWS, 0.02)
    assert (choice.name, choice.within) == ("q4_k_m", True)
    assert "0.0120 at" in choice.reason and "q4_k_s, has 0.0300" in choice.reason and "0.02 nats" in choice.reason
    assert recommend(ROWS, 0.001).name == "q8_0"
    assert recommend(ROWS, 1.0).name == "q4_k_s"


def test_the_far_end_of_an_interval_and_the_loss_count() -> None:
    sure, unsure = row("sure", 20, 0.018), row("unsure", 10, 0.018, spread=0.01)
    assert recommend([sure, unsure], 0.02).name == "sure"
    lossy = row("lossy", 10, 0.001, loss=0.5)
    assert recommend([lossy, row("wide", 30, 0.0005)], 0.02).name == "wide"


def test_nothing_within_the_limit_is_said() -> None:
    choice = recommend(ROWS, 1e-6)
    assert (choice.name, choice.within) == ("q8_0", False)
    assert "no measured format" in choice.reason
    assert recommend([], 0.1).name is None


def test_one_cost_is_one_number_wherever_it_is_told() -> None:
    """The table, the recommendation and the advice show the divergence; the end of its interval is named as such."""
    rows = [row("q2_k", 40, 0.4, spread=0.1), row("q4_k_m", 62, 0.019, spread=0.002), row("q5_k_m", 75, 0.012)]
    choice = recommend(rows, 0.02)
    assert choice.name == "q5_k_m" and "q4_k_m, has 0.0190 (its 95 % interval reaches 0.0210)" in choice.reason
    _, tests, balance = sayings(rows, 0.02)
    assert "q2_k 0.4000;" in tests.measured and "0.5" not in tests.measured
    assert "q5_k_m 0.0120 at" in balance.measured and "q4_k_m 0.0190 (its 95 %" in balance.measured


@pytest.mark.parametrize(
    ("num_tokens", "num_windows", "words"),
    [(17, 3, "Only 17 tokens were"), (1, 1, "Only 1 token was"), (5000, 1, "single window"), (5000, 9, None)],
)
def test_figures_of_too_little_text_are_doubted(num_tokens: int, num_windows: int, words: str | None) -> None:
    found = warnings(num_tokens, num_windows)
    assert len(found) == (words is not None) and (words is None or words in found[0])


def test_sayings_stand_beside_figures() -> None:
    medium, tests, balance = sayings([*ROWS, row("q2_k", 40, 0.4), row("q5_k_m", 75, 0.004)], 0.02)
    assert medium.verdict == "yes" and "q4_k_m 0.0120 at" in medium.measured
    assert tests.verdict == "yes" and "q2_k 0.4000" in tests.measured
    assert balance.verdict == "yes" and "q4_k_m" in balance.measured
    worse = [row("q4_k_m", 62, 0.02), row("q4_k_s", 60, 0.01)]
    assert sayings(worse, 0.02)[0].verdict == "no"
    close = [*ROWS, row("q5_k_m", 75, 0.0040, spread=0.001), row("q5_k_s", 74, 0.0045, spread=0.001)]
    assert sayings(close, 0.02)[0].verdict == "in part"
    assert [saying.verdict for saying in sayings([row("nf4", 70, 0.04)], 0.02)] == ["open"] * 3


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
def test_a_wrong_name_is_told_what_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_target(typed, "--formats")
    assert meant in str(caught.value.fix) and f"--formats {typed}" in str(caught.value)


def test_a_format_that_is_only_read_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="No weights can be packed in iq2_xs") as caught:
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


def test_rows_that_are_no_whole_blocks_fall_back() -> None:
    model = llama(hidden=96)
    maps = [f"{name}.weight" for name in linear_maps(model)]
    ((candidate,), _) = list_candidates(model, maps, ["q4_k_s"])
    by_map = {name: format.name for name, format in candidate.formats.items()}
    assert by_map["model.layers.0.self_attn.q_proj.weight"] == "q5_0"  # for q4_k
    assert by_map["model.layers.0.self_attn.v_proj.weight"] == "q5_1"  # for q5_k
    assert by_map["model.layers.1.mlp.down_proj.weight"] == "q4_k"  # rows of 512
    assert by_map["lm_head.weight"] == "q8_0"


def test_an_architecture_that_llama_cpp_does_not_know_has_safetensors_only() -> None:
    model = build(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2), torch.float32)
    found, left_out = list_candidates(model, [f"{n}.weight" for n in linear_maps(model)], ["q4_0", "nf4"])
    assert [candidate.name for candidate in found] == ["nf4"] and left_out == ["q4_0"]


# --- the whole way, on a real tiny model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:

    from tests.conftest import make_tokenizer

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


def ask(folder: Path, text: Path, **options: Any) -> Survey:
    model = ModelConfig(id=str(folder), dtype="float32")
    return Survey(model, str(text), **{"names": ("q8_0", "q4_0", "nf4"), "num_tokens": 200, **options})


def test_the_report_is_whole(folder: Path, text: Path) -> None:
    report = survey(ask(folder, text))
    assert set(report) == {
        *("schema", "status", "subject", "num_tokens", "num_windows", "limit", "reference", "formats", "front"),
        *("recommendation", "sayings", "skipped", "warnings"),
    }
    assert report["schema"] == 1 and report["status"] == "finished"
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
    assert report["reference"]["quality"]["kl"]["value"] == 0
    assert report["recommendation"]["name"] in report["front"]
    json.dumps(report, allow_nan=False)


def test_a_survey_goes_on_where_it_was_stopped(folder: Path, text: Path, tmp_path: Path) -> None:
    first = survey(ask(folder, text, names=("q8_0", "nf4"), out=tmp_path / "out"))
    stages: list[str] = []
    again = survey(ask(folder, text, out=tmp_path / "out"), lambda event: stages.append(getattr(event, "stage", "")))
    packed = {stage.split(" ")[0] for stage in stages if stage.endswith("packing")}
    assert packed == {"q4_0"}
    kept = {each["name"]: each for each in again["formats"]}
    assert all(kept[each["name"]] == each for each in first["formats"])
    assert json.loads((tmp_path / "out" / "formats.json").read_text())["status"] == "finished"


def test_another_text_is_not_mixed_in(folder: Path, text: Path, tmp_path: Path) -> None:
    survey(ask(folder, text, names=("q8_0",), out=tmp_path / "out"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "what is two plus two? it is four"}\n')
    with pytest.raises(EvaluationError, match="another model, text"):
        survey(ask(folder, other, names=("q8_0",), out=tmp_path / "out"))


def test_a_full_folder_is_not_touched(folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        survey(ask(folder, text, out=tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        survey(ask(folder, text, out=tmp_path / "mine.txt"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "formats.json").write_text("{}")
    with pytest.raises(EvaluationError, match="no comparison"):
        survey(ask(folder, text, names=("q8_0",), out=tmp_path / "bad"))


def test_no_text_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        survey(ask(folder, tmp_path / "missing.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        survey(ask(folder, tmp_path / "empty.jsonl"))


def test_a_format_that_cannot_hold_the_model_is_skipped_and_told(folder: Path, text: Path) -> None:
    events: list[Any] = []
    report = survey(ask(folder, text, names=("q8_0", "iq4_nl", "tq2_0")), events.append)
    assert {each["name"] for each in report["formats"]} | {each["name"] for each in report["skipped"]} == {
        *("q8_0", "iq4_nl", "tq2_0")
    }
    told = [event.message for event in events if isinstance(event, Warned)]
    assert len([message for message in told if "cannot hold" in message]) == len(report["skipped"])


# --- the page --------------------------------------------------------------------------------------------------------


class _Checker(HTMLParser):
    void = frozenset({"meta", "br", "line", "path", "circle", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if key in ("src", "href") and value]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(folder: Path, text: Path) -> None:
    report = survey(ask(folder, text))
    page = render_page(report)
    checker = _Checker()
    checker.feed(page)
    assert checker.open == [] and checker.links == []
    assert page.count('<svg class="chart"') == 4  # two charts, wide and narrow
    for each in report["formats"]:
        assert f">{each['name']}<" in page
    assert report["recommendation"]["name"] in page.split('class="choice"')[1][:40]


def test_labels_cover_neither_dots_nor_one_another() -> None:
    dots = [
        Dot(f"format-{i}", 3 + 0.02 * i, 0.01 * 1.05**i, float("nan"), float("nan"), "other", "") for i in range(12)
    ]
    drawn = size_chart(dots, Axes("size", "loss", 0.02, "limit"), width=880)
    import re

    boxes = []
    for x, y, anchor, label in re.findall(
        r'class="name other" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', drawn
    ):
        width = 7.2 * len(label)
        start = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((start, float(y) - 11, start + width, float(y) + 2))
    assert len(boxes) >= 4
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_what_is_far_off_stands_at_the_edge() -> None:
    dots = [Dot("near", 1, 0.01, 0.009, 0.011, "front", ""), Dot("far", 2, 50.0, 45.0, 55.0, "other", "")]
    drawn = size_chart(dots, Axes("size", "loss", 0.02, "limit", top=1.0), width=600)
    assert drawn.count("<circle") == 1 and 'class="dot" d="M' in drawn


# --- the screen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_nothing(width: int) -> None:
    rows = [*ROWS, row("hqq-2-g128", 55, 0.06)]
    report = {
        "formats": [each.to_dict() for each in rows],
        "reference": row("none", 200, 0.0).to_dict(),
        "front": pareto_front(rows),
        "recommendation": asdict(recommend(rows, 0.02)),
        "sayings": [asdict(each) for each in sayings(rows, 0.02)],
        "num_tokens": 10_602,
        "num_windows": 1,
        "subject": {"model": "my model", "data": "held-out.jsonl", "dtype": "bfloat16"},
    }
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    for each in _render(report, None, console):
        console.print(each)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    lines = shown.splitlines()
    for each in rows:
        assert any(line.strip(" ●").startswith(f"{each.name} ") for line in lines), each.name
    assert ("Left out in so narrow a terminal: " in shown) == (width < 120)
    text = " ".join(shown.split())
    assert "Measured on 10,602 tokens of held-out.jsonl (1 window)" in text
    assert "Recommended: q4_k_m, the smallest" in text and "ingle quantize 'my model' --to q4_k_m" in text
