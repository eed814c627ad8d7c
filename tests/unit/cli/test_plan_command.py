"""``ingle plan``: its JSON contract, its tables, its errors, and that it loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ingle import adapters, models
from ingle.cli import planning
from ingle.cli.app import app
from ingle.cli.shapes import read_shape
from ingle.errors import ConfigError, IngleError
from ingle.planning import ModelShape
from ingle.training.model_shape import model_shape

QLORA = ["--model.id=meta-llama/Llama-3.1-8B", "--base.format=nf4", "--data.max_seq_len=2048"]
KEYS = ["fits", "strategy", "per_device", "host_bytes", "disk_bytes", "tokens_per_s", "hours", "price", "alternatives"]
EMBER = Path(__file__).parents[3] / "examples/models/ember-6m"
PARTS = ("weights", "gather", "adapter", "gradient", "optimizer", "activation", "overhead")


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "160"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def plan(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def test_the_answer_keeps_its_contract() -> None:
    answer = plan(*QLORA, "--device", "2x rtx-4090")
    assert list(answer) == KEYS and answer["fits"] is True
    memory = answer["per_device"]
    assert list(memory) == ["total_bytes", *(f"{part}_bytes" for part in PARTS)]
    assert memory["total_bytes"] == sum(memory[f"{part}_bytes"] for part in PARTS) < 0.95 * (24 << 30)
    assert answer["strategy"]["world_size"] == 2
    assert answer["hours"] > 0 and answer["price"] == pytest.approx(2 * 0.40 * answer["hours"])
    assert {entry["device"] for entry in answer["alternatives"]} > {"2x rtx-4090"}
    for entry in answer["alternatives"]:
        assert set(entry) >= set(KEYS) - {"host_bytes", "disk_bytes", "alternatives"}


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys; sys.argv = ['ingle', 'plan', *sys.argv[1:]]\n"
        "from ingle.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules), file=sys.stderr)\n"
    )
    words = [*QLORA, "--device", "h100"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("set()")


def test_more_cards_are_faster_and_a_budget_names_them() -> None:
    one, eight = (plan(*QLORA, "--device", f"{count}x a100-80gb") for count in (1, 8))
    assert 6 < eight["tokens_per_s"] / one["tokens_per_s"] < 8
    cheap = plan(*QLORA, "--device", "rtx-4090", "--budget", "1 EUR")["alternatives"]
    rented = [entry for entry in cheap if entry["device"] != "1x rtx-4090"]
    assert rented and all(entry["price"] <= 1.15 for entry in rented)
    assert [entry["hours"] for entry in rented] == sorted(entry["hours"] for entry in rented)


def test_what_does_not_fit_gets_changes_that_make_it_fit() -> None:
    full = [*QLORA[:1], "--adapter=none", "--device", "rtx-4090"]
    answer = plan(*full)
    assert answer["fits"] is False and answer["per_device"]["total_bytes"] > 24 << 30
    text = run(*full)
    assert "It does not fit. " in text and "--adapter.kind=lora" in text


def test_fixed_options_are_kept() -> None:
    answer = plan(*QLORA, "--device", "2x h100", "--parallel.kind=fsdp", "--parallel.recompute=true")
    assert (answer["strategy"]["kind"], answer["strategy"]["recompute"]) == ("zero3", True)
    single = plan(*QLORA, "--device", "2x h100", "--parallel.kind=none")
    assert single["strategy"]["world_size"] == 1


def test_several_machines_share_within_each_and_copy_across() -> None:
    words = ["--device", "8x h100", "--parallel.kind=hsdp", "--parallel.num_processes=16"]
    strategy = plan(*QLORA, *words)["strategy"]
    assert (strategy["kind"], strategy["world_size"], strategy["shard_size"]) == ("hsdp", 16, 8)


def test_tables_name_strategies_devices_and_what_was_assumed() -> None:
    text = run(*QLORA, "--device", "2x rtx-4090")
    for words in ("Strategies on 2x rtx-4090", "Cheapest rented devices", "assumed", "Prices are rental prices"):
        assert words in text


def test_the_picture_shows_each_strategy_against_the_card(tmp_path: Path) -> None:
    path = tmp_path / "memory.svg"
    answer = plan(*QLORA, "--device", "2x rtx-4090", "--picture", str(path))
    root = ElementTree.parse(path).getroot()
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    here = [entry for entry in answer["alternatives"] if entry["device"] == "2x rtx-4090" and not entry["change"]]
    rows = [text for text in texts if "micro-batch" in text]
    assert len(rows) == min(10, 1 + len(here)) and rows[0].startswith("▸ ")
    assert "23.60 GiB, 22.42 GiB usable" in texts


def test_a_local_folder_and_its_data_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    Path("model/config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100, **sizes}))
    Path("data.jsonl").write_text('{"text": "some words"}\n' * 50, encoding="utf-8")
    answer = plan("--model.id=model", "--data.sources=data.jsonl", "--output=o", "--objective=clm")
    assert answer["fits"] and answer["strategy"]["kind"] == "none" and answer["price"] >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "2x rtx-4099"], "did you mean rtx-4090"),
        (["--budget", "much"], "no amount of money"),
        (["--device", "2x h100", "--parallel.num_processes=4"], "4 processes need 4 devices"),
        (["--parallel.kind=zero4"], "zero3"),
        (["--device", "8x h100", "--parallel.kind=hsdp", "--parallel.shard_size=3"], "groups of 3"),
        (["--devise=h100"], "--device"),
    ],
)
def test_mistakes_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(IngleError, match=message):
        run(*QLORA, *words)


def test_an_architecture_without_a_shape_needs_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(IngleError, match="hub"):
        run("--model.id=nobody/nothing-at-all")
    with pytest.raises(ConfigError):
        run()


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_reward_model_has_a_head_for_one_number(adapter: str) -> None:
    words = (f"--model.id={EMBER}", "--objective.kind=reward", f"--adapter={adapter}")
    planned, run = planned_shape(*words), planning._load(list(words))[0]
    model = models.meta_model(run.model, "cpu", torch.bfloat16, models.model_task(run.objective))
    built = model_shape(model, adapters.select(model, run.adapter))
    for name in ("num_parameters", "vocab_size", "saved_parameters", "tied"):
        assert getattr(planned, name) == getattr(built, name), name


@pytest.mark.parametrize("mix", ["q4_k_m", "q8_0"])
def test_a_gguf_file_is_counted_with_the_types_of_its_tensors(
    mix: str, tmp_path: Path, gguf_of: Callable[[Path, Path, str], Path]
) -> None:
    file = gguf_of(EMBER, tmp_path / "ember.gguf", mix)
    counted = planned_shape(f"--model.id={file}")
    assert counted.num_parameters == planned_shape(f"--model.id={EMBER}").num_parameters
    as_base = planned_shape(f"--model.id={EMBER}", f"--base.format={mix}")
    bits = [lin.bits_per_weight or 8.5 for shape in (counted, as_base) for lin in shape.linears]
    assert bits[: len(bits) // 2] == bits[len(bits) // 2 :], "a mix as the base has the types of a file of that type"
    assert counted.end_bits_per_weight is not None


def test_an_architecture_without_arithmetic_is_built_and_counted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon", **sizes}), encoding="utf-8")
    text = run(f"--model.id={tmp_path}")
    assert "There is no arithmetic for falcon: its modules were built and counted." in text


def planned_shape(*words: str) -> ModelShape:
    loaded, _ = planning._load(list(words))
    return read_shape(loaded)[0]
