"""Reading a task: references, groups, draws and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingle.config import Source, TaskConfig
from ingle.errors import DataError, EvaluationError
from ingle.evaluation import read_task


def task_of(tmp_path: Path, rows: list[dict], name: str = "task.jsonl", **options) -> TaskConfig:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TaskConfig(sources=(Source(path=str(path)),), **options)


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def test_references_begin_with_the_answer_and_are_distinct(tmp_path):
    rows = [chat("q", "a", references=["b", "a", "", "c"]), {"prompt": "p", "completion": "x", "references": ["y"]}]
    first, second = (read_task(task_of(tmp_path, [row], f"{number}.jsonl"))[0] for number, row in enumerate(rows))
    assert (first.prompt, first.references) == ("q", ("a", "b", "c"))
    assert (second.prompt, second.references) == ("p", ("x", "y"))


def test_a_conversation_is_shown_with_its_roles(tmp_path):
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "See you"},
        ]
    }
    (sample,) = read_task(task_of(tmp_path, [row]))
    assert sample.prompt == "system: Be brief.\n\nuser: Hi\n\nassistant: Hello\n\nuser: Bye"
    assert sample.references == ("See you",)


def test_rows_with_one_prompt_become_references_of_one_sample(tmp_path):
    rows = [chat("q1", "a"), chat("q2", "b"), chat("q1", "c"), chat("q1", "a"), chat("q1 ", "d")]
    samples = read_task(task_of(tmp_path, rows, group_by_prompt=True))
    assert [(sample.prompt, sample.references) for sample in samples] == [
        ("q1", ("a", "c")),
        ("q2", ("b",)),
        ("q1 ", ("d",)),
    ]


def test_repeated_prompts_give_a_warning(tmp_path):
    warnings = []
    samples = read_task(task_of(tmp_path, [chat("q", "a"), chat("q", "b")]), on_warning=warnings.append)
    assert len(samples) == 2
    assert any("group_by_prompt" in warning for warning in warnings)


def test_a_draw_is_the_seeds_and_keeps_the_order(tmp_path):
    rows = [chat(f"q{number}", "a") for number in range(40)]

    def draw(seed: int) -> list[str]:
        return [sample.prompt for sample in read_task(task_of(tmp_path, rows, num_samples=12, seed=seed))]

    assert draw(1) == draw(1) != draw(2)
    numbers = [int(prompt[1:]) for prompt in draw(1)]
    assert numbers == sorted(set(numbers)) and len(numbers) == 12


def test_too_few_samples_for_the_draw_give_a_warning(tmp_path):
    warnings = []
    samples = read_task(task_of(tmp_path, [chat("q", "a")], num_samples=5), on_warning=warnings.append)
    assert len(samples) == 1 and any("only 1" in warning for warning in warnings)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}]},
        chat("q", "  "),
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]},
    ],
    ids=["no answer", "empty answer", "ends with a question"],
)
def test_a_row_without_a_reference_is_named(tmp_path, row):
    with pytest.raises((EvaluationError, DataError)) as error:
        read_task(task_of(tmp_path, [chat("q", "a"), row]))
    assert error.value.where.endswith("task.jsonl:2")


def test_an_empty_answer_with_other_references_is_left_out(tmp_path):
    (sample,) = read_task(task_of(tmp_path, [chat("q", "", references=["", "b"])]))
    assert sample.references == ("b",)


def test_plain_text_suits_likelihoods_only(tmp_path):
    rows = [{"text": "Some text."}]
    (sample,) = read_task(task_of(tmp_path, rows, metrics=("bits_per_byte",)))
    assert (sample.prompt, sample.references) == ("", ("Some text.",))
    with pytest.raises(EvaluationError, match="plain text"):
        read_task(task_of(tmp_path, rows, metrics=("bits_per_byte", "chrf")))


def test_an_empty_file(tmp_path):
    with pytest.raises(DataError):
        read_task(task_of(tmp_path, []))
