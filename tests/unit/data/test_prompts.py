"""Prompts whose answers are sampled: which rows they are read from, their tokens, and the columns that rewards get."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict

import pytest

from ingle.config.data import DataConfig
from ingle.config.policy import Grpo, RolloutConfig
from ingle.data import Example, Message, build_dataset, build_prompts, hold_out, prompt_ids
from ingle.data.inspection import inspect
from ingle.data.layout_detection import guess_objective
from ingle.data.layouts import parse_row
from ingle.errors import ConfigError, DataError

ASK = [{"role": "user", "content": "what is two?"}]
SAID = [{"role": "assistant", "content": "a number"}]
NO = [{"role": "assistant", "content": "no"}]
AGAIN = [{"role": "user", "content": "and three?"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path, tokenizer, objective="grpo", sink=None, **options):
    data = DataConfig(sources=[{"path": str(path)}], **options)
    return build_prompts(data, tokenizer, objective=objective, sink=sink)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "what is two?"}, "what is two?", None),
        ({"prompt": ASK, "solution": "2"}, ["user"], None),
        ({"question": "what is two?", "answer": "2 #### 2"}, "what is two?", "2 #### 2"),
        ({"query": "what is two?", "response": "2"}, "what is two?", "2"),
        ({"prompt": "what is two?", "completion": "2"}, "what is two?", "2"),
        ({"prompt": "what is two?", "system": "be brief"}, ["system", "user"], None),
        ({"instruction": "double it", "input": "2", "output": "4"}, "double it\n\n2", "4"),
        ({"messages": ASK + SAID}, ["user"], "a number"),
        ({"messages": ASK + SAID + AGAIN}, ["user", "assistant", "user"], None),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, ["user"], "yes"),
        ({"chosen": ASK + SAID, "rejected": ASK + NO}, ["user"], "a number"),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, ["user"], "yes"),
        ({"prompt": "what is two?", "completions": ["2", "3"], "scores": [1, 0]}, "what is two?", None),
    ],
)
def test_a_prompt_is_read_from_every_layout_and_its_answer_becomes_a_column(row, prompt, answer):
    example = parse_row(row, "prompts", "f:1")
    found = [message.role for message in example.messages] or example.prompt
    assert found == prompt
    assert example.columns.get("answer") == answer
    assert not {"prompt", "completion", "completions"} & set(example.columns), "rewards have arguments of these names"


def test_verl_rows_keep_their_nested_columns():
    row = {
        "data_source": "openai/gsm8k",
        "prompt": ASK,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"index": 3, "split": "train"},
    }
    columns = parse_row(row, "prompts", "f:1").columns
    assert columns == {name: value for name, value in row.items() if name != "prompt"}


def test_columns_are_json_and_others_are_left_out_with_a_remark():
    day = datetime.date(2024, 5, 6)
    example = parse_row({"prompt": "a", "day": day, "blob": b"x", "tags": ("a", 1)}, "prompts", "f:1")
    assert example.columns == {"day": "2024-05-06", "tags": ["a", 1]}
    assert "'blob'" in example.remarks[0]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": ASK + SAID}, "cannot be continued"),
        ({"messages": SAID}, "no message of a user"),
        ({"text": "a"}, "it has no prompt"),
        ({"prompt": 7}, "it has no prompt"),
    ],
)
def test_a_row_without_a_prompt_is_an_error(row, why):
    with pytest.raises(DataError, match=why):
        parse_row(row, "prompts", "f:1")


def test_columns_without_a_prompt_are_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match="columns have no prompt"):
        read(write(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}]), tokenizer)


@pytest.mark.parametrize(
    ("layout", "objective"), [("messages", "grpo"), ("preference", "ppo"), ("prompts", "sft"), ("prompts", "dpo")]
)
def test_layouts_of_other_objectives_are_refused(tmp_path, tokenizer, layout, objective):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "messages": ASK, "chosen": "a", "rejected": "b"}])
    data = DataConfig(sources=[{"path": path, "layout": layout}])
    with pytest.raises(DataError, match=f"The layout {layout} does not suit the objective {objective}"):
        build_dataset(data, tokenizer, objective=objective)


def test_tokens_are_those_that_generation_reads(tmp_path, tokenizer):
    rows = [{"prompt": "what is two?", "n": 1}, {"prompt": ASK + SAID + AGAIN}, {"messages": AGAIN + SAID, "n": 2}]
    prompts = read(write(tmp_path / "a.jsonl", rows), tokenizer, system="be brief")
    asked = Message("user", "what is two?")
    expected = [
        Example("f:1", messages=(asked,)),
        Example("f:2", messages=(asked, Message("assistant", "a number"), Message("user", "and three?"))),
        Example("f:3", messages=(Message("user", "and three?"),)),
    ]
    for i, example in enumerate(expected):
        assert prompts.ids(i).tolist() == prompt_ids(tokenizer, example, "be brief")
        assert (prompts.sample(i).labels < 0).all(), "no token carries loss"
    assert prompts.prompt(0) == "what is two?", "a text stays a text for rewards"
    assert prompts.prompt(2) == [{"role": "system", "content": "be brief"}, *AGAIN]
    assert [prompts.columns(i) for i in range(3)] == [
        {"n": 1, "answer": None, "messages": None},
        {"n": None, "answer": None, "messages": None},
        {"n": 2, "answer": "a number", "messages": AGAIN + SAID},
    ]


def test_a_text_without_a_template_is_continued(tmp_path, tokenizer_factory):
    plain = tokenizer_factory(chat_template=None)
    prompts = read(write(tmp_path / "a.jsonl", [{"prompt": "what is two?"}]), plain)
    assert plain.decode(prompts.ids(0)).removeprefix("<s>") == "what is two?"


def test_the_fingerprint_covers_columns(tmp_path, tokenizer):
    texts = [{"prompt": "a", "answer": answer} for answer in ("1", "1", "2")]
    one, same, other = (read(write(tmp_path / f"{i}.jsonl", [row]), tokenizer) for i, row in enumerate(texts))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def long_rows(tokenizer):
    turns = [turn for i in range(6) for turn in ({"role": "user", "content": f"what is {i}?"}, *SAID)]
    system = {"role": "system", "content": "be brief"}
    return [{"prompt": "one"}, {"prompt": [system, *turns, *AGAIN]}, {"prompt": "word " * 200}, {"prompt": " "}]


def test_prompts_that_leave_no_room_for_the_answer_are_dropped(tmp_path, tokenizer):
    warnings = []
    path = write(tmp_path / "a.jsonl", long_rows(tokenizer))
    grpo = Grpo(kind="grpo", rewards=["reward.py"], rollout=RolloutConfig(max_new_tokens=40))
    longest = int(read(path, tokenizer, max_seq_len=4096).lengths[1])
    for objective, kept in ((grpo, [1]), ("grpo", [1, 2])):
        prompts = read(path, tokenizer, objective, max_seq_len=longest, sink=warnings.append)
        assert [prompts.origin(i) for i in range(len(prompts))] == [f"{path}:{line}" for line in kept]
    assert any("less 40 tokens for the answer" in getattr(each, "message", "") for each in warnings)
    with pytest.raises(ConfigError, match="leave no room"):
        read(path, tokenizer, grpo, max_seq_len=40)


def test_prompts_are_cut_to_their_last_messages_if_wanted(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", long_rows(tokenizer))
    whole, cut = (read(path, tokenizer, max_seq_len=n, too_long="truncate") for n in (4096, 64))
    system, last = Message("system", "be brief"), Message("user", "and three?")
    texts = [tokenizer.decode(cut.ids(i)) for i in range(3)]
    assert cut.lengths.max() <= 64 < whole.lengths[1]
    assert prompt_ids(tokenizer, Example("f", messages=(system, last)))[:4] == cut.ids(1)[:4].tolist()
    assert "what is 5?" in texts[1] and "what is 0?" not in texts[1] and "be brief" in texts[1]
    assert cut.ids(2).tolist()[-8:] == whole.ids(2).tolist()[-8:], "a single message loses its beginning"
    assert cut.stats.truncated_tokens == int((whole.lengths - cut.lengths).sum())


def test_held_out_prompts_share_none_with_training(tmp_path, tokenizer):
    rows = [{"prompt": f"how much is {i} and {i * 7}?", "answer": str(i)} for i in range(40)]
    path = write(tmp_path / "a.jsonl", [*rows, *rows])
    data = DataConfig(sources=[{"path": path}], validation=0.2, packing=False)

    def build(own):
        return build_prompts(own, tokenizer, objective="grpo")

    prompts = build(data)
    sequences, held_out = hold_out(prompts, data, 0, build)
    trained = {prompts.prompt(int(i)) for each in sequences for i in each}
    measured = {prompts.prompt(int(i)) for i in held_out.documents}
    assert measured and not trained & measured
    assert all(len(each) == 1 for each in sequences), "every sequence is one prompt"


@pytest.mark.sweep
def test_rows_are_the_same_from_the_cache(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("ingle.data.dataset_builder._CACHED_BYTES", 1)
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"how much is {i}?", "answer": str(i)} if i % 3 else {"prompt": " "} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    first, again = read(path, tokenizer), read(path, tokenizer)
    monkeypatch.undo()
    plain = read(path, tokenizer)
    assert first.fingerprint() == again.fingerprint() == plain.fingerprint()
    assert first.columns(0) == {"answer": "1"}


def test_inspection_shows_prompts_and_columns(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "one?", "answer": "1"}, {"prompt": "two?", "level": [3]}])
    report = inspect(DataConfig(sources=[{"path": path}]), tokenizer, Grpo(kind="grpo", rewards=["reward.py"]))
    assert [(each.name, each.count) for each in report.columns] == [("answer", 1), ("level", 1)]
    assert [dict(preview.columns) for preview in report.previews] == [
        {"answer": "1", "level": "null"},
        {"answer": "null", "level": "[3]"},
    ]
    json.dumps(asdict(report))


def test_a_file_of_prompts_is_recognized():
    assert guess_objective({"prompt": "one?", "ground_truth": "1"}, "f:1") == "grpo"
    assert guess_objective({"prompt": "one?", "completion": "1"}, "f:1") == "sft"


def test_gsm8k_is_read_as_it_is(shared_data, tokenizer):
    prompts = read(shared_data / "gsm8k" / "test.jsonl", tokenizer, max_seq_len=4096)
    assert len(prompts) == 1319
    assert prompts.columns(0)["answer"].endswith("#### 18")
