"""Each command with a fake API: what it passes on and prints."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ingle.cli.exit_status import run_command
from ingle.config import Run, run_from_yaml
from ingle.events import Started, Step
from ingle.planning import Plan, Strategy
from ingle.planning.memory import MemoryParts
from tests.stored_results import COMPARISON, STORED, SUMMARY

CONFIG = "model: {id: m}\nbase: {format: nf4, block_size: 32}\ndata: {sources: a.jsonl}\noutput: runs/x\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    fake = SimpleNamespace(**members)
    monkeypatch.setitem(sys.modules, f"ingle.{name}", fake)
    monkeypatch.setattr(f"ingle.{name}", fake, raising=False)


class Flow:
    """Records its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[Run] = []
        self.resumed: list[Path] = []
        self.planned: list[Run] = []
        replace(monkeypatch, "flow", finetune=self.finetune, resume=self.resume, plan=self.plan)

    def finetune(self, run: Run, sink: Any) -> dict[str, Any]:
        self.runs.append(run)
        return {}

    def resume(self, path: Path, sink: Any) -> dict[str, Any]:
        self.resumed.append(path)
        return {}

    def plan(self, run: Run, sink: Any) -> Plan:
        self.planned.append(run)
        return Plan(
            num_steps=6,
            global_batch_size=16,
            micro_batch_size=8,
            grad_accum_steps=2,
            tokens_per_step=4096.0,
            num_tokens=24576,
            num_epochs=1.5,
            save_every=0,
            compile=False,
            trainable_parameters=1000,
            num_parameters=100_000,
            flops_per_token=4e5,
            memory={"weights": 1 << 20, "total": 1 << 20},
            strategy=Strategy(),
            per_device=MemoryParts(weights_bytes=1 << 20),
            host_bytes=1 << 20,
            disk_bytes=1 << 20,
            device="a CPU",
            tokens_per_s=100.0,
            hours=0.1,
            price=0.0,
        )


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Flow:
    return Flow(monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        ["run.yaml", "--optim.lr=1e-4", "--seed", "3"],
        ["--optim.lr", "1e-4", "--seed=3", "run.yaml"],
        ["--optim.lr", "1e-4", "run.yaml", "--seed", "3", "--debug"],
    ],
)
def test_train_takes_overrides_in_any_order(flow: Flow, words: list[str]) -> None:
    assert run_command(["train", *words]) == 0
    assert [(run.optim.lr, run.seed, run.model.id) for run in flow.runs] == [(1e-4, 3, "m")]


def test_train_warns_of_options_that_an_override_drops(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "run.yaml", "--base=int8"]) == 0
    out = capsys.readouterr().out
    assert "Warning: Ignoring base.block_size (run.yaml:2)" in out


def test_train_resumes_a_folder(flow: Flow) -> None:
    assert run_command(["train", "--resume", "runs/x"]) == 0
    assert flow.resumed == [Path("runs/x")] and flow.runs == []


def test_dry_run_only_plans(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "run.yaml", "--dry-run"]) == 0
    assert len(flow.planned) == 1 and flow.runs == []
    out = capsys.readouterr().out
    assert "6 (1.5 epochs)" in out and "at the end only" in out


def test_a_missing_tracker_is_reported_before_the_run_starts(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_command(["train", "run.yaml", "--wandb", "project"]) == 2
    assert flow.runs == [] and "[wandb]" in capsys.readouterr().err


def test_trackers_get_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    writer = SimpleNamespace(add_scalar=lambda *entry: written.append(entry), close=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", SimpleNamespace(Writer=lambda folder: writer))

    def finetune(run: Run, sink: Any) -> None:
        plan = Flow(pytest.MonkeyPatch()).plan(run, sink).to_dict()
        sink(Started(run.model_dump(mode="json"), plan, {}, 0, 1))
        sink(Step(1, 2.0, 1, 1.0, 1.0, 1.0, 1, 1.0))

    replace(monkeypatch, "flow", finetune=finetune)
    assert run_command(["train", "run.yaml", "--tensorboard"]) == 0
    assert ("train/loss", 2.0, 1) in written


def test_config_show_is_yaml_with_origins_that_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", "show", "run.yaml", "--base.format=int8", "--optim.lr", "3e-4"]) == 0
    out, err = capsys.readouterr()
    assert "lr: 0.0003  # flag" in out and "id: m  # file" in out and "seed: 0  # default" in out
    assert "base.block_size" in err
    assert run_from_yaml(out).optim.lr == 3e-4
    assert yaml.safe_load(out)["base"] == {"format": "int8"}
    assert run_command(["config", "show", "run.yaml", "--objective=dpo"]) == 0
    out = capsys.readouterr().out
    assert "  # default of dpo with an adapter" in out and run_from_yaml(out).optim.lr == 2e-5


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", "schema"]) == 0
    assert "optim" in json.loads(capsys.readouterr().out)["properties"]


class Engine:
    """Answers a prompt with its last words."""

    adapted = True
    source = None
    reads_sources = False
    model = "model"
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")

    def __init__(self) -> None:
        self.asked: list[tuple[list[Any], dict[str, Any]]] = []
        self.streamed: list[tuple[Any, dict[str, Any]]] = []

    def generate(self, prompts: list[Any], *, on_progress: Any, **options: Any) -> list[Any]:
        self.asked.append((prompts, options))
        on_progress(len(prompts), len(prompts))
        last = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in prompts]
        return [SimpleNamespace(text=f"re {text}", finish_reason="stop", token_ids=(1, 2)) for text in last]

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        self.streamed.append((prompt, options))
        yield "so "
        yield prompt[-1].content


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    opened: list[tuple[str, bool]] = []

    def open_model(path: str, *, base_only: bool = False, allow_mismatch: bool = False, sink: Any = None) -> Engine:
        opened.append((path, base_only))
        return engine

    replace(monkeypatch, "inference", open_model=open_model, locate=lambda path: SimpleNamespace(original=None))
    engine.opened = opened  # type: ignore[attr-defined]
    return engine


def test_generate_prints_the_answer_alone(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max-new-tokens", "7", "--stop", "#", "--stop", "x", "--system", "be brief", "--base-only"]
    assert run_command(["generate", "runs/x", "--prompt", "hello", *words]) == 0
    assert capsys.readouterr().out == "re hello\n"
    prompts, options = engine.asked[0]
    assert [(message.role, message.content) for message in prompts[0]] == [("user", "hello")]
    assert options["max_new_tokens"] == 7 and options["stop"] == ["#", "x"] and options["system"] == "be brief"
    assert options["temperature"] == 0.0
    assert engine.opened == [("runs/x", True)]  # type: ignore[attr-defined]


def test_generate_json_is_one_object_a_line(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", "m", "--prompt", "a", "--prompt", "é", "--json"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "a", "text": "re a", "finish_reason": "stop", "num_tokens": 2},
        {"prompt": "é", "text": "re é", "finish_reason": "stop", "num_tokens": 2},
    ]


def test_generate_reads_prompts_from_files(engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "one"},
        "two",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}]},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "known"}]},
    ]
    (folder / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (folder / "p.txt").write_text("five\n\nsix\n")
    assert run_command(["generate", "m", "--prompt-file", "p.jsonl"]) == 0
    assert capsys.readouterr().out == "--- 1\nre one\n--- 2\nre two\n--- 3\nre three\n--- 4\nre four\n"
    assert [message.role for message in engine.asked[0][0][2]] == ["system", "user"]
    assert run_command(["generate", "m", "--prompt-file", "p.txt", "--raw", "--prompt", "zero"]) == 0
    assert engine.asked[1][0] == ["zero", "five", "six"]
    assert run_command(["generate", "m", "--prompt-file", "p.jsonl", "--raw"]) == 2


def test_a_model_without_chat_template_only_continues_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "tokenizer", SimpleNamespace(chat_template=None))
    for words in (["generate", "m", "--prompt", "x"], ["chat", "m"]):
        assert run_command(words) == 2
        assert "--raw" in capsys.readouterr().err
    assert run_command(["generate", "m", "--prompt", "x", "--raw"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{bad\n", "p.jsonl:1"),
        ('{"prompt": "x"}\n{"text": 1}\n', "p.jsonl:2"),
        ('{"messages": [{"role": "user"}]}\n', "a role and a content"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "no message to answer"),
        ("", "There is no prompt."),
    ],
)
def test_invalid_rows_name_their_line(
    engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (folder / "p.jsonl").write_text(text)
    assert run_command(["generate", "m", "--prompt-file", "p.jsonl"]) == 2
    assert said in capsys.readouterr().err
    assert engine.asked == []


def test_generate_takes_standard_input_as_one_prompt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert run_command(["generate", "m"]) == 0
    assert engine.asked[0][0][0][0].content == "two\nlines"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run_command(["generate", "m"]) == 2
    assert "There is no prompt." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "a", "--prompt", " "], "--prompt 2 of 2"),
        (["--prompt", "", "--raw"], "A prompt is empty."),
        (["--prompt-file", "promts.txt"], "did you mean prompts.txt?"),
        (["--prompt-file", "."], "is a folder"),
        (["--prompt", "a\udcff"], "not valid Unicode"),
        (["--prompt", "a", "--system", "\udcff"], "--system"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--top-p", "0", "--temperature", "1"], "--top-p must be above 0"),
        (["--prompt", "a", "--seed", "-1"], "--seed"),
    ],
)
def test_invalid_prompts_and_options_are_refused(
    engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (folder / "prompts.txt").write_text("x\n")
    assert run_command(["generate", "m", *words]) == 2
    assert said in capsys.readouterr().err and engine.asked == []


def test_white_space_can_be_continued_and_lines_end_where_json_says(engine: Engine, folder: Path) -> None:
    assert run_command(["generate", "m", "--raw", "--prompt", "\n"]) == 0
    (folder / "p.jsonl").write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")
    assert run_command(["generate", "m", "--raw", "--prompt-file", "p.jsonl"]) == 0
    assert [prompts for prompts, _ in engine.asked] == [["\n"], ["one\u2028line"]]


def test_chat_remembers_until_it_is_reset(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nand?\n/reset\nanew\n/exit\nnever\n"))
    assert run_command(["chat", "runs/x", "--system", "s"]) == 0
    assert capsys.readouterr().out == "so hi\nso and?\nso anew\n"
    contents = [[message.content for message in prompt] for prompt, _ in engine.streamed]
    assert contents == [["hi"], ["hi", "so hi", "and?"], ["anew"]]
    assert engine.streamed[0][1]["system"] == "s" and engine.streamed[0][1]["temperature"] == 0.7


@pytest.fixture
def evaluated(engine: Engine, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Any]:
    (folder / "task.yaml").write_text("sources: held.jsonl\nmetrics: [bleu]\n")
    asked: list[Any] = []

    def evaluate(path_or_id: str, tasks: list[Any], sink: Any, *, allow_mismatch: bool) -> list[Any]:
        asked.extend(tasks)
        return [SUMMARY if path_or_id == "m" else COMPARISON]

    replace(monkeypatch, "scoring", evaluate=evaluate)
    return asked


def test_evaluate_compares_what_was_trained_with_its_base(
    evaluated: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["evaluate", "runs/x", "--task", "task.yaml", "--num_samples=3", "--out", "report.json"]) == 0
    assert [task.num_samples for task in evaluated] == [3]
    out = capsys.readouterr().out
    assert "BLEU" in out and COMPARISON.verdict[:40] in out
    assert json.loads((folder / "report.json").read_text()) == STORED["comparison"]


def test_a_run_is_asked_its_own_task_unless_another_is_given(evaluated: list[Any], folder: Path) -> None:
    (folder / "runs" / "x" / "adapter").mkdir(parents=True)
    task = "evaluate: {sources: own.jsonl, metrics: [bleu], num_samples: 9}\n"
    (folder / "runs" / "x" / "run.yaml").write_text(CONFIG + task)
    (folder / "runs" / "x" / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "other.yaml").write_text(CONFIG + "evaluate: {sources: other.jsonl}\n")
    for words in (
        ["runs/x"],
        ["runs/x/adapter", "--num_samples=3", "--metrics=[chrf]"],
        ["runs/x", "--task", "other.yaml"],
        ["Qwen/Qwen3-0.6B", "--sources=[held.jsonl]"],
    ):
        assert run_command(["evaluate", *words]) == 0
    tasks = [(task.sources[0].path, (task.metrics or ("suitable",))[0], task.num_samples) for task in evaluated]
    assert tasks == [
        ("own.jsonl", "bleu", 9),
        ("own.jsonl", "chrf", 3),
        ("other.jsonl", "suitable", None),
        ("held.jsonl", "suitable", None),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "ingle evaluate RUN_OR_MODEL"),
        (["run.yaml"], "ingle evaluate RUN_OR_MODEL --task run.yaml"),
        (["a", "b"], "Expected one model, got 2: a, b."),
        (["plain"], "plain is not a run, so it has no task of its own."),
        (["trained"], "trained has no task"),
        (["trained", "--task", "run.yaml"], "This config has no task"),
        (["trianed"], "did you mean trained?"),
    ],
)
def test_evaluate_says_what_is_missing(
    evaluated: list[Any], folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    for name, file in (("trained", "run.yaml"), ("plain", "config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text(CONFIG)
    assert run_command(["evaluate", *words]) == 2
    assert said in capsys.readouterr().err and evaluated == []


def test_evaluate_checks_its_output_path_first(
    evaluated: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "runs/x", "--task", "task.yaml", "--out"]
    assert run_command([*words, "new/scores.json"]) == 0 and (folder / "new" / "scores.json").is_file()
    evaluated.clear()
    assert run_command([*words, "new"]) == 2 and "--out new/scores.json" in capsys.readouterr().err
    assert (
        run_command([*words, "task.yaml/scores.json"]) == 2 and "task.yaml cannot be created" in capsys.readouterr().err
    )
    monkeypatch.setattr("os.access", lambda path, *_, **__: Path(path).name != "new")
    assert run_command([*words, "new/more.json"]) == 2 and "The folder new is not writable." in capsys.readouterr().err
    assert evaluated == []


def test_evaluate_scores_another_model_alone(evaluated: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", "m", "--task", "task.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STORED["summary"]
    assert run_command(["evaluate", "m", "--task", "task.yaml"]) == 0
    assert "71.4 %" in capsys.readouterr().out


def test_data_inspect_looks_at_the_data_of_the_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def look(data: Any, tokenizer: Any, objective: Any, held_out: Any, **options: Any) -> Any:
        asked.append((data, tokenizer, objective, held_out, options))
        return make_dataclass("Report", ["problems"])([])

    replace(monkeypatch, "cli.tokenizer_loading", load_apart=lambda model: f"tokenizer of {model.id}")
    replace(monkeypatch, "data.inspection", inspect=look)
    replace(monkeypatch, "report.data_tables", render_report=lambda report, console: None)
    assert run_command(["data", "inspect", "run.yaml", "--seed=4", "--num-previews", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"problems": []}
    data, tokenizer, objective, held_out, options = asked[0]
    assert [source.path for source in data.sources] == ["a.jsonl"]
    assert (tokenizer, objective.kind, held_out) == ("tokenizer of m", "sft", None)
    assert (options["num_previews"], options["seed"]) == (1, 4)
    assert run_command(["data", "inspect", "run.yaml"]) == 0
