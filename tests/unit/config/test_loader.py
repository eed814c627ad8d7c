from __future__ import annotations

import os
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from ingle.config import Int8Base, LoraAdapter, Nf4Base, NoAdapter, Run, TaskConfig
from ingle.config.base import FormatName
from ingle.config.loader import load_run, load_task, run_from_yaml, run_to_yaml, to_yaml
from ingle.config.schema import options
from ingle.errors import ConfigError

MINIMAL = """\
model: {id: base}
data:
  sources: [train.jsonl]
output: runs/x
"""

#: Every format, as in messages.
FORMATS = " or ".join(", ".join(get_args(FormatName)).rsplit(", ", 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.relative_to(folder)


def load(folder: Path, *flags: str, text: str = MINIMAL) -> Run:
    return load_run(write(folder, text), flags).run


def failure(folder: Path, *flags: str, text: str = MINIMAL) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run(write(folder, text), flags)
    return caught.value


def test_defaults_file_and_flags_and_where_each_value_comes_from(folder: Path) -> None:
    loaded = load_run(
        write(folder, MINIMAL + "optim: {lr: 3e-4, betas: [0.8, 0.9]}\n"), ["--optim.betas.1=.95", "--seed", "-0"]
    )
    assert loaded.run.optim.lr == 3e-4
    assert loaded.run.optim.betas == (0.8, 0.95)
    assert loaded.run.adapter == LoraAdapter()
    origins = loaded.origins
    assert origins["optim.lr"] == origins["data.sources.0.path"] == "file"
    assert origins["optim.betas"] == origins["seed"] == "flag"
    assert origins["adapter.rank"] == origins["adapter.kind"] == origins["evaluate"] == "default"
    flat = Run.model_fields.keys() - {path.split(".")[0] for path in origins}
    assert not flat


def test_flags_alone_make_a_run() -> None:
    run = load_run(None, ["--model.id=m", "--data.sources=a.jsonl", "--output", "o"]).run
    assert (run.model.id, run.data.sources[0].path, run.output) == ("m", "a.jsonl", "o")


def test_resolved_yaml_gives_an_equal_run(folder: Path) -> None:
    run = load(
        folder,
        "--base=nf4",
        "--optim.lr=1.2345678901234567e-5",
        "--optim.eps=1e-12",
        "--data.system='3e-4'",
        "--data.sources.0.columns={a b: 'no', x: \"two\\nlines\"}",
        "--model.revision=0123",
        "--evaluate.sources=[{path: t.csv, limit: 3}, u.csv]",
        "--evaluate.stop=['#', '\\n']",
        "--evaluate.metrics=exact_match",
        "--evaluate.answer_pattern='#### (-?[0-9]+)'",
        "--adapter.target_modules=[q_proj, 'layers.*.mlp.*']",
        "--train.compile=false",
    )
    assert run.model.revision == "0123" and run.data.system == "3e-4"
    text = run_to_yaml(run)
    assert run_from_yaml(text) == run
    assert run_to_yaml(run_from_yaml(text)) == text


def test_comments_in_yaml_change_nothing() -> None:
    loaded = load_run(None, ["--model.id=m", "--data.sources=[a, b]", "--output=o # p", "--data.system='x # y'"])
    text = to_yaml(loaded.run, loaded.origins)
    for line in ("  lr: null  # default", "  id: m  # flag", "    - path: a  # flag", "  system: 'x # y'  # flag"):
        assert line in text.splitlines()
    assert yaml.safe_load(text)["data"] == loaded.run.model_dump(mode="json")["data"]
    assert all("  # " in line for line in text.splitlines() if not line.endswith(":"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--base.format=int8"], Int8Base(format="int8")),
        (["--base=int8"], Int8Base(format="int8")),
        (["--base", "{format: nf4, block_size: 128}"], Nf4Base(format="nf4", block_size=128)),
        (["--base.block_size=32"], Nf4Base(format="nf4", block_size=32, double_quant=False)),
    ],
)
def test_choosing_another_member_drops_the_options_of_the_old_one(
    folder: Path, flags: list[str], expected: object
) -> None:
    loaded = load_run(write(folder, MINIMAL + "base: {format: nf4, double_quant: false}\n"), flags)
    assert loaded.run.base == expected
    if isinstance(expected, Int8Base):
        assert loaded.notes == ["Ignoring base.double_quant (run.yaml:5): base.format=int8 has no such option."]
    else:
        assert loaded.notes == []


def test_a_missing_kind_is_the_default_and_may_be_changed_by_a_flag(folder: Path) -> None:
    text = MINIMAL + "adapter: {rank: 4}\nobjective: {}\n"
    assert load(folder, text=text).adapter == LoraAdapter(rank=4)
    assert load(folder, text=text).objective.kind == "sft"
    changed = load_run(write(folder, text), ["--adapter.kind=none"])
    assert changed.run.adapter == NoAdapter(kind="none")
    assert len(changed.notes) == 1 and "adapter.rank" in changed.notes[0]


def test_a_flag_that_does_not_belong_to_the_new_member_is_an_error(folder: Path) -> None:
    error = failure(folder, "--adapter.kind=none", "--adapter.rank=4")
    assert error.message == "adapter.rank is not an option."
    assert error.fix == "it belongs to adapter.kind=lora, dora or qa_lora"


def test_a_file_that_contradicts_itself_is_an_error(folder: Path) -> None:
    error = failure(folder, text=MINIMAL + "adapter: {kind: none, rank: 4}\n")
    assert error.message == "adapter.rank is not an option."
    assert error.where == "adapter.rank (run.yaml:5)"


def test_base_options_without_a_format_ask_for_it(folder: Path) -> None:
    error = failure(folder, text=MINIMAL + "base: {double_quant: true}\n")
    assert error.message == f"base.format must be given: {FORMATS}."
    assert error.where == "base (run.yaml:5)"
    assert failure(folder, text=MINIMAL + "base: {fromat: nf4}\n").fix == "write format instead of fromat"


@pytest.mark.parametrize(
    "written", ["a.jsonl", "{path: a.jsonl}", "[a.jsonl]", "[{path: a.jsonl}]", "{path: a.jsonl, split: train}"]
)
def test_sources_may_be_written_short(folder: Path, written: str) -> None:
    run = load(folder, text=f"model: {{id: m}}\noutput: o\ndata: {{sources: {written}}}\n")
    assert [source.path for source in run.data.sources] == ["a.jsonl"]


def test_list_items_are_addressed_by_position(folder: Path) -> None:
    run = load(folder, "--data.sources.0.limit=3", "--data.sources.1=b.csv", "--data.sources.1.columns.prompt=mr")
    assert [(source.path, source.limit) for source in run.data.sources] == [("train.jsonl", 3), ("b.csv", None)]
    assert run.data.sources[1].columns == {"prompt": "mr"}
    assert failure(folder, "--data.sources.5=b.csv").message == "'5' is not a position in a list of 1."


def test_a_text_is_accepted_as_a_list_of_one(folder: Path) -> None:
    run = load(folder, "--adapter.target_modules=q_proj", "--evaluate.sources=e", "--evaluate.metrics=bleu")
    assert isinstance(run.adapter, LoraAdapter) and run.adapter.target_modules == ("q_proj",)
    assert run.evaluate is not None and run.evaluate.metrics == ("bleu",)
    assert load(folder, "--adapter.target_modules=all-linear").adapter == LoraAdapter()


def test_text_is_kept_as_written_and_integers_are_accepted_in_any_notation(folder: Path) -> None:
    run = load(
        folder, "--output=2024", "--data.system=no", "--model.revision=1e10", "--train.num_steps=1e3", "--optim.lr=1"
    )
    assert (run.output, run.data.system, run.model.revision) == ("2024", "no", "1e10")
    assert run.train.num_steps == 1000 and type(run.train.num_steps) is int
    assert type(run.optim.lr) is float
    assert failure(folder, "--train.num_steps=1.5").message.endswith("or null, not 1.5.")


def test_a_flag_without_value_means_true_only_for_true_or_false(folder: Path) -> None:
    assert load(folder, "--train.imatrix", "--seed=1").train.imatrix is True
    assert failure(folder, "--train.num_steps", "--seed=1").message == "--train.num_steps needs a value."


@pytest.mark.parametrize(
    ("flag", "message", "fix"),
    [
        ("--optim.lrr=1", "optim.lrr is not an option.", "did you mean optim.lr?"),
        ("--lr=1", "lr is not an option.", "did you mean optim.lr?"),
        ("--max-seq-len=9", "max_seq_len", "did you mean data.max_seq_len?"),
        ("--data.sources.0.pth=x", "data.sources.0.pth is not an option.", "did you mean data.sources.0.path?"),
        ("--optm.lr=1", "optm is not an option.", "did you mean optim?"),
        (
            "--base.format=nf5",
            f"base.format must be {FORMATS}, not nf5.",
            "did you mean nf4?",
        ),
        (
            "--model.dtype=bflot16",
            "model.dtype must be auto, bfloat16 or float32, not bflot16.",
            "did you mean bfloat16?",
        ),
        ("--evaluate={sources: e, metrics: [blue]}", "evaluate.metrics must be a list", "did you mean bleu?"),
        ("--model=gpt2", "model must be a section, not gpt2.", "--model.id=gpt2"),
        ("--optim.lr=0", "optim.lr must be a number above 0 and at most 1,000 or null, not 0.", None),
        ("--optim.lr=.nan", "optim.lr must be a number above 0 and at most 1,000 or null, not .nan.", None),
        ("--optim.lr=.inf", "optim.lr must be a number above 0 and at most 1,000 or null, not .inf.", None),
        ("--optim.lr=", "optim.lr must be a number above 0 and at most 1,000 or null, not", None),
        ("--output=", "output is empty.", None),
        ("--data.sources=[]", "data.sources is empty.", None),
        ("--data.sources.0=null", "data.sources.0 must be a section, not null.", "--data.sources.0.path=VALUE"),
        (
            "--evaluate.sources=null",
            "evaluate.sources must be a list of sections, or of text, not null.",
            "--evaluate=null",
        ),
        ("--optim.betas=[0.1]", "optim.betas must be a list of 2", None),
        ("--optim.betas=[0.1, 0.2, 0.3]", "optim.betas must be a list of 2", None),
        ("--model.id.x=1", "model.id is not a section or a list.", None),
        ("--train.compile=maybe", "train.compile must be auto, true or false, not maybe.", None),
        ("--evaluate.seed=1", "evaluate.sources must be given.", "add it to the file, or use --evaluate.sources=VALUE"),
        ("--train={num_steps: [}", "This is not valid YAML.", None),
        ("train.num_steps=3", "'train.num_steps=3' is not an override.", "write overrides as --train.num_steps=3"),
    ],
)
def test_mistakes_are_reported_in_plain_words(folder: Path, flag: str, message: str, fix: str | None) -> None:
    error = failure(folder, flag)
    if flag.startswith("--max"):
        assert error.message == "max-seq-len is not an option."
    else:
        assert message in error.message
    if fix is not None:
        assert error.fix == fix
    assert "pydantic" not in str(error) and "Input should" not in str(error)


def test_all_problems_are_reported_together_with_their_lines(folder: Path) -> None:
    error = failure(folder, "--seed=-1", "--bse=nf4", text=MINIMAL + "optim:\n  lr: fast\n  lrr: 1\n")
    text = str(error)
    assert text.startswith("The config has 4 problems.")
    for part in ("optim.lr (run.yaml:6)", "optim.lrr (run.yaml:7)", "--seed=-1", "did you mean base?"):
        assert part in text


def test_missing_sections_name_the_option_to_give(folder: Path) -> None:
    text = str(failure(folder, text=""))
    for name in ("model.id", "data.sources", "output"):
        assert f"{name} must be given." in text


def test_paths_are_looked_up_in_the_current_folder_and_then_beside_the_config(folder: Path) -> None:
    for name in ("conf/train.jsonl", "conf/both.jsonl", "both.jsonl", "conf/glob/1.jsonl", "conf/t.jinja"):
        write(folder, "", name)
    (folder / "conf/base").mkdir()
    (folder / "conf/gone").mkdir()
    path = write(
        folder,
        "model: {id: base, chat_template: t.jinja, tokenizer: Qwen/Qwen3-8B}\noutput: gone\n"
        "data: {sources: [train.jsonl, both.jsonl, glob/*.jsonl, nowhere.jsonl]}\n"
        "evaluate: {sources: train.jsonl}\n",
        "conf/run.yaml",
    )
    run = load_run(path).run
    assert run.model.id == "conf/base"
    assert run.model.chat_template == "conf/t.jinja"
    assert run.model.tokenizer == "Qwen/Qwen3-8B"
    assert run.output == "gone"  # the run creates it, so it is relative to the current folder
    assert [source.path for source in run.data.sources] == [
        "conf/train.jsonl",
        "both.jsonl",
        "conf/glob/*.jsonl",
        "nowhere.jsonl",
    ]
    assert run.evaluate is not None and run.evaluate.sources[0].path == "conf/train.jsonl"
    typed = load_run(path, ["--data.sources=train.jsonl"]).run
    assert typed.data.sources[0].path == "train.jsonl"


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    run = load(folder, "--output=~/run", "--data.sources=~/a.jsonl")
    assert (run.output, run.data.sources[0].path) == ("/somewhere/run", "/somewhere/a.jsonl")


def test_a_task_file(folder: Path) -> None:
    path = write(folder, "sources: held.jsonl\nmetrics: [exact_match]\nanswer_pattern: 'A: (.*)'\n", "conf/task.yaml")
    write(folder, "", "conf/held.jsonl")
    task = load_task(path, ["--max_new_tokens=7", "--stop=no"])
    assert isinstance(task, TaskConfig)
    assert (task.sources[0].path, task.max_new_tokens, task.stop) == ("conf/held.jsonl", 7, ("no",))
    with pytest.raises(ConfigError, match=r"top_p = 0\.5 has no effect") as caught:
        load_task(path, ["--top_p=0.5"])
    assert caught.value.where == "top_p, temperature"


def test_a_run_config_is_accepted_as_a_task_file(folder: Path) -> None:
    path = write(folder, MINIMAL + "evaluate: {sources: held.jsonl, metrics: bleu}\n")
    task = load_task(path, ["--num_samples=3"])
    assert (task.sources[0].path, task.metrics, task.num_samples) == ("held.jsonl", ("bleu",), 3)


def test_files_that_are_not_a_config(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/run.yaml").write_text(MINIMAL)
    write(folder, MINIMAL)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "latin.yaml").write_bytes(b"seed: 0\n# \xe9\n")
    os.mkfifo(folder / "pipe.yaml")
    with open(folder / "huge.yaml", "wb") as file:
        file.truncate(2 << 30)
    write(folder, "- a\n", "list.yaml")
    for name, said in (
        ("nope.yaml", "does not exist"),
        ("run", "is a folder"),
        ("bytes.yaml", "is UTF-16"),
        ("latin.yaml", "line 2 contains the byte 0xe9"),
        ("pipe.yaml", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("huge.yaml", "too large"),
        ("list.yaml/x", "does not exist"),
        ("x" * 300, "cannot be read"),
        ("rum.yaml", r"did you mean run\.yaml"),
        ("list.yaml", "must contain options such as"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_run(Path(name))


@pytest.mark.parametrize(
    "flag",
    [
        *("--seed=1e400", "--seed=9223372036854775808", "--seed=-1", "--evaluate.seed=-1"),
        *("--train.global_batch_size=1e12", "--train.micro_batch_size=1e12", "--train.num_steps=1e300"),
        *("--data.max_seq_len=1e12", "--adapter.rank=1e12", "--evaluate.num_samples=1e12", "--train.num_epochs=1e300"),
        *("--parallel.num_threads=1e12", "--evaluate.batch_size=1e12", "--adapter.alpha=1e300", "--optim.eps=1e300"),
        *("--optim.weight_decay=.nan", "--evaluate.temperature=.inf", "--evaluate.max_new_tokens=1e12"),
        *("--output=~nobody-of-this-name", "--data.sources.9999999999=x", "--data.sources.²=x", "--x" + ".y" * 3000),
        *(f"--{'x' * 100_000}=1", "--seed=[" + "1," * 5_000 + "]", "--output=" + "x/" * 1_000),
    ],
)
def test_extreme_values_are_refused(folder: Path, flag: str) -> None:
    if flag.startswith("--output"):
        assert load(folder, flag).output == flag.removeprefix("--output=")
        return
    error = failure(folder, flag, "--evaluate.sources=e.jsonl")
    assert len(str(error)) < 1000
    assert flag[2:].partition("=")[0][:12] in str(error)


def test_long_lists_of_problems_are_cut(folder: Path) -> None:
    error = failure(folder, text=MINIMAL + "".join(f"key{number}: 1\n" for number in range(5000)))
    assert "has 5,000 problems" in error.message and "and 4,988 more" in error.message


def test_every_number_has_an_upper_bound() -> None:
    for option in options():
        for number in re.findall(r"an? (?:number|integer)(?: [^,|]*?(?:at most|below))?", option.type):
            assert number.endswith(("at most", "below")), option.path


def test_options_without_effect_are_named(folder: Path) -> None:
    text = MINIMAL + "base: {format: nf4, block_size: 32}\ntrain: {num_epochs: 2}\n"
    loaded = load_run(write(folder, text), ["--train.num_steps=3", "--model.id=m.GGUF", "--optim.warmup_steps=1"])
    assert loaded.run.base.format == "none"
    assert [note.partition(" (")[0] for note in loaded.notes] == [
        "Ignoring base.format=nf4",
        "Ignoring train.num_epochs",
    ]
    assert loaded.notes[1] == "Ignoring train.num_epochs (run.yaml:6): train.num_steps is set."
    assert load(folder, "--model.id=m.gguf", "--base=nf4", text=text).base.format == "nf4"  # its unquantized part


def test_python_objects_take_the_same_short_forms() -> None:
    run = Run.model_validate(
        {
            "model": {"id": "m"},
            "base": "nf4",
            "adapter": "none",
            "objective": {},
            "data": {"sources": "a"},
            "output": "o",
        }
    )
    assert run.base == Nf4Base(format="nf4") and run.adapter == NoAdapter(kind="none")
    assert run.data.sources[0].path == "a"
