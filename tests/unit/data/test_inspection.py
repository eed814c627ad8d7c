"""Reports on a dataset with a model, on a terminal with and without colour, and on rows without a model."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest
from rich.console import Console

from ingle.cli.exit_status import run_command
from ingle.config.data import SUFFIXES, DataConfig, Source
from ingle.config.evaluate import TaskConfig
from ingle.config.objective import Clm, Sft
from ingle.config.preferences import Dpo, Kto
from ingle.data.dataset_builder import build_dataset
from ingle.data.inspection import inspect, inspect_rows
from ingle.data.packing import make_sequences
from ingle.data.readers import known_suffixes
from ingle.data.sources import read_examples
from ingle.errors import DataError
from ingle.report.data_tables import render_report, render_rows


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path)}]


@pytest.fixture()
def report(tmp_path, tokenizer):
    rows = [chat(f"what is {i} plus two?", f"it is {i + 2}.\nyes") for i in range(30)]
    rows += [rows[0], chat("hello", " "), chat("the end", "word " * 60)]
    data = DataConfig(sources=write(tmp_path / "train.jsonl", rows), max_seq_len=96)
    held = TaskConfig(sources=write(tmp_path / "test.jsonl", [rows[3], chat("unseen", "answer")]))
    return inspect(data, tokenizer, Sft(), held), data


def draw(report, render=render_report, **options):
    buffer = io.StringIO()
    render(report, Console(file=buffer, width=140, **options))
    return buffer.getvalue()


def test_figures_are_those_of_training(report, tokenizer):
    report, data = report
    dataset = build_dataset(data, tokenizer, objective="sft")
    assert report.stats == dataset.stats
    assert sum(bar.count for bar in report.lengths.histogram) == len(dataset) == 32
    assert (report.lengths.min, report.lengths.max) == (dataset.lengths.min(), 96)
    assert all(
        a.high + 1 == b.low for a, b in zip(report.lengths.histogram, report.lengths.histogram[1:], strict=False)
    )
    assert report.lengths.histogram[-1].high == 96
    sequences = make_sequences(dataset, data, 0)
    assert (report.packing.sequences, report.packing.efficiency) == (len(sequences), sequences.efficiency)


def test_previews_show_what_carries_loss(report, tokenizer):
    report, _ = report
    assert len(report.previews) == 3
    first = report.previews[0]
    assert "".join(s.text for s in first.stretches if s.supervised) == "it is 2.\nyes<|im_end|>"
    assert [s.text for s in first.stretches if s.special and s.supervised] == ["<|im_end|>"]
    assert sum(p.num_supervised for p in report.previews[:1]) == len(tokenizer("it is 2.\nyes")["input_ids"]) + 1
    assert first.origin.endswith("train.jsonl:1")


def test_endings_are_the_last_supervised_tokens(report):
    report, _ = report
    assert (report.endings[0].token, report.endings[0].count, report.endings[0].ends_turn) == ("<|im_end|>", 31, True)
    assert sum(ending.count for ending in report.endings) == 32


def test_every_problem_is_a_sentence(report):
    report, _ = report
    problems = "\n".join(report.problems)
    for part in ("Empty answer", "cut (3.1%)", "not end in a token", "exact duplicate", "held-out prompts"):
        assert part in problems, part
    assert report.duplicates.exact == 1
    assert report.overlap.same_row == 1


def test_report_is_plain_data(report):
    report, _ = report
    plain = json.loads(json.dumps(asdict(report)))
    assert plain["stats"]["documents"] == 32
    assert plain["overlap"]["rows"] == 2
    assert plain["previews"][0]["stretches"][0]["supervised"] is False


def test_clean_data_have_no_problems(tmp_path, tokenizer):
    words = ["apple", "river", "stone", "cloud", "lamp"]
    data = DataConfig(sources=write(tmp_path / "a.jsonl", [chat(f"define {w}", f"a {w} is here") for w in words]))
    report = inspect(data, tokenizer, Sft())
    assert report.problems == ()
    assert report.overlap is None
    assert "No problems" in draw(report)


def test_nothing_odd_is_never_said_below_a_list(tmp_path, tokenizer):
    """Few near duplicates are no problem of their own, and listed all the same."""
    rows = [chat(f"define {i * 7919} by {i * 13}", f"{i * 104729} or {i * 1299709}") for i in range(1, 31)]
    rows += [chat("name the red river of the far north", f"it is the one that you know{end}") for end in ("", ".")]
    report = inspect(DataConfig(sources=write(tmp_path / "a.jsonl", rows)), tokenizer, Sft())
    assert report.problems == () and len(report.duplicates.near_pairs) == 1
    assert "Near duplicates" in draw(report) and "No problems were found." not in draw(report)


def test_control_tokens_in_messages_are_shown(tmp_path, tokenizer):
    rows = [chat("what is two?", "four"), chat("hello <|im_end|> you", "a <|im_start|> b"), chat("<|im_end|> x", "y")]
    report = inspect(DataConfig(sources=write(tmp_path / "a.jsonl", rows)), tokenizer, Sft())
    found = {r.reason: (r.count, r.first) for r in report.stats.control_tokens}
    place = f"{tmp_path / 'a.jsonl'}:2"
    assert found == {"<|im_end|>": (2, place), "<|im_start|>": (1, place)}
    assert "control tokens in messages" in draw(report)
    assert any(
        problem.startswith("Control tokens inside messages") and "(2 rows, first " in problem
        for problem in report.problems
    )
    assert "".join(s.text for s in report.previews[1].stretches if s.supervised) == "a <|im_start|> b<|im_end|>"


def test_pieces_of_split_text_are_no_problem(tmp_path, tokenizer):
    data = DataConfig(sources=write(tmp_path / "a.jsonl", [{"text": "hello world " * 99}]), max_seq_len=32)
    assert inspect(data, tokenizer, Clm(kind="clm")).problems == ()


def test_without_colour_marks_show_supervision(report):
    text = draw(report[0])
    assert "\x1b" not in text
    assert "«it is 2.⏎" in text
    assert "yes<|im_end|>»" in text
    assert "«» carries loss" in text


def test_with_colour_there_are_no_marks(report):
    text = draw(report[0], force_terminal=True, color_system="standard", no_color=False)
    assert "«" not in text
    assert "\x1b[1;32mit is 2.⏎" in text
    assert "green carries loss" in text


def test_terminals_that_know_only_ascii_can_show_it(report):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    render_report(report[0], Console(file=file, width=140))
    file.flush()
    text = file.buffer.getvalue().decode("ascii")
    assert "[[it is 2.\\n" in text
    assert "###" in text


def test_brackets_in_the_data_are_no_markup(tmp_path, tokenizer):
    data = DataConfig(sources=write(tmp_path / "a.jsonl", [chat("[bold]x[/bold]", "[red]y[/nonsense]")]))
    text = draw(inspect(data, tokenizer, Sft()))
    assert "[bold]x[/bold]" in text
    assert "«[red]y[/nonsense]<|im_end|>»" in text


def test_real_data(shared_data, tokenizer):
    columns = {"prompt": "mr", "completion": "ref"}
    data = DataConfig(sources=[{"path": str(shared_data / "e2e" / "devset.csv"), "columns": columns, "limit": 600}])
    held = TaskConfig(sources=[{"path": str(shared_data / "e2e" / "testset_w_refs.csv"), "columns": columns}])
    report = inspect(data, tokenizer, Sft(), held)
    assert report.stats.documents == 600
    assert report.duplicates.same_prompt > 300
    assert report.overlap.rows == 4693
    assert "held-out answers in training" in draw(report)


def test_a_file_is_inspected_without_a_model(tmp_path):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (1, 5, 9, 9)] + [{"prompt": "x", "completion": " "}]
    path = write(tmp_path / "a.jsonl", rows)[0]["path"]
    report = inspect_rows(path)
    assert (report.rows, report.layouts, report.columns) == (5, {"prompt-completion": 5}, ("prompt", "completion"))
    assert (report.characters.min, report.characters.max, report.characters.median) == (2, 11, 7)
    assert report.problems == (
        f"1 row with an empty answer or text (first {path}:5).",
        "1 of 5 rows is an exact duplicate.",
    )
    text = draw(report, render_rows)
    assert "--model" in text and "No problems" not in text
    assert json.loads(json.dumps(asdict(report)))["rows"] == 5


def test_the_command_takes_a_bare_file(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}])[0]["path"]
    assert run_command(["data", "inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"] == {"text": 1}
    assert run_command(["data", "inspect", path, "--data.max_seq_len=8"]) == 2
    assert f"ingle data inspect {path} --model PATH_OR_ID" in capsys.readouterr().err


def test_several_files_may_have_several_layouts(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "one"}])
    write(
        tmp_path / "b.jsonl",
        [
            {"messages": [{"role": "user", "content": "hi"}]},
            {"text": "x", "messages": [{"role": "user", "content": "ho"}]},
        ],
    )
    report = inspect_rows(str(tmp_path))
    assert report.layouts == {"text": 1, "messages": 2}
    assert report.problems == (f"2 rows without an assistant turn (first {tmp_path / 'b.jsonl'}:1).",)
    assert [role for role, _ in report.previews[1].parts] == ["user"]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "columns: {prompt: prompt, completion: chosen}"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "columns: {prompt: question, completion: chosen}"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, "columns: {messages: chosen}"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "columns: {text: chosen}"),
    ],
)
def test_sft_refuses_preferences_with_a_way_out(tmp_path, row, columns):
    path = write(tmp_path / "a.jsonl", [row])[0]["path"]
    with pytest.raises(DataError, match="looks like preference data") as caught:
        list(read_examples([Source(path=path)], objective="sft"))
    assert columns in str(caught.value.fix) and "--objective.kind=dpo" in str(caught.value.fix)
    assert caught.value.where == f"{path}:1"


def test_preferences_are_shown_with_what_the_doctor_found(tmp_path, tokenizer):
    rows = [{"prompt": f"what is {i}?", "chosen": "yes " * 5, "rejected": "no"} for i in range(20)]
    rows += [{"prompt": "what is 3?", "chosen": "no", "rejected": "yes " * 5}, {**rows[0], "rejected": " "}]
    data = DataConfig(sources=write(tmp_path / "a.jsonl", rows), max_seq_len=64)
    report = inspect(data, tokenizer, Dpo(kind="dpo"), num_previews=2)
    assert [preview.label for preview in report.previews] == ["chosen (score 1)", "rejected (score 0)"] * 2
    assert "".join(s.text for s in report.previews[1].stretches if s.supervised) == "no<|im_end|>"
    assert report.problems[0].startswith("Rows skipped: Empty answer (1 row, first ")
    path = data.sources[0].path
    assert f"1 pair is judged both ways (first {path}:21)." in report.problems
    assert "A rule that prefers the longer answer is right in 95.2% of the pairs." in report.problems
    text = draw(report)
    for line in (
        "42 answers to 20 prompts, 21 pairs",
        "Judged both ways, for example",
        "1 judged more than once, 1 of",
    ):
        assert line in text
    (pair,) = report.preferences.contradictions
    assert (pair.first, pair.second) == (f"{path}:4", f"{path}:21")
    assert json.loads(json.dumps(asdict(report)))["preferences"]["contradictory"] == 1
    judged = [{"prompt": f"what is {i}?", "completion": "yes", "label": i > 0} for i in range(9)]
    data = DataConfig(sources=write(tmp_path / "b.jsonl", judged))
    report = inspect(data, tokenizer, Kto(kind="kto"))
    assert "8 answers are good and 1 are bad." in report.problems
    assert "good 1.00, bad 8.00 (auto)" in draw(report)


def test_rows_with_several_answers_are_inspected_without_a_model(tmp_path):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": " "}]
    report = inspect_rows(write(tmp_path / "a.jsonl", pairs)[0]["path"])
    assert report.layouts == {"preference": 2}
    assert report.previews[0].parts == (("prompt", "a"), ("chosen (score 1)", "b"), ("rejected (score 0)", "c"))
    assert report.problems == (f"1 row with an empty answer or text (first {tmp_path / 'a.jsonl'}:2).",)
    judged = [{"prompt": "a", "completion": "b", "label": True}]
    report = inspect_rows(write(tmp_path / "b.jsonl", judged)[0]["path"])
    assert report.previews[0].parts == (("prompt", "a"), ("completion", "b"), ("score", "1"))


def test_the_suffixes_of_configs_are_those_that_can_be_read():
    assert known_suffixes() == SUFFIXES
