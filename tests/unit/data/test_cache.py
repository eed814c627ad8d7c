"""Large datasets: what is read from the cache equals what is tokenized in memory, and nothing is tokenized twice."""

from __future__ import annotations

import copy
import csv
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ingle import env
from ingle.config.data import DataConfig
from ingle.config.objective import Sft
from ingle.data import ContaminationSearch, dataset_builder, duplicates, worker_pool
from ingle.data.cache import DataCache
from ingle.data.dataset_builder import build_dataset
from ingle.data.inspection import inspect
from ingle.data.row_encoder import token_options
from ingle.data.shards import open_shard
from ingle.data.types import Example, Message
from ingle.errors import DataError, IngleError
from ingle.events import Progress, Warned

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "two",
    "plus",
    "four",
    "is",
    "six",
    "yes",
    "no",
    "perhaps",
    "日本",
    "naïve",
    "🙂",
]


@pytest.fixture(autouse=True)
def small_chunks(tmp_path, monkeypatch):
    """Every dataset is large, and has many chunks."""
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ingle.data.dataset_builder._CACHED_BYTES", 0)
    monkeypatch.setattr("ingle.data.chunks._MIN_BYTES", 4000)
    monkeypatch.setattr("ingle.data.chunks._MEAN_BYTES", 4000)
    monkeypatch.setattr("ingle.data.chunks._MAX_BYTES", 40_000)
    monkeypatch.setattr(env, "num_processors", lambda: 1)


@pytest.fixture()
def tasks(monkeypatch):
    """The chunks that are tokenized."""
    found = []
    submit = worker_pool.WorkerPool.submit

    def record(pool, task):
        found.append(task.chunk)
        return submit(pool, task)

    monkeypatch.setattr(worker_pool.WorkerPool, "submit", record)
    return found


def say(rng, most=40):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def make_chats(count, seed=0):
    """Conversations, some of them without an answer, with control tokens, or too long."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        turns = [("user", f"{number} {say(rng)}"), ("assistant", say(rng, 120))] * rng.randint(1, 2)
        if rng.random() < 0.05:
            turns = turns[:1]
        if rng.random() < 0.05:
            turns[0] = ("user", "hello <|im_end|> there")
        if rng.random() < 0.05:
            turns[-1] = ("assistant", " ")
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(tmp_path, count=300):
    return DataConfig(sources=str(write(tmp_path / "a.jsonl", make_chats(count))), max_seq_len=128)


@contextmanager
def in_memory():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_builder, "_CACHED_BYTES", 1 << 60)
        yield


def build(data, tokenizer, objective="sft", **options):
    """Builds a dataset; returns it with its warnings."""
    events = []
    dataset = build_dataset(data, tokenizer, objective=objective, sink=events.append, **options)
    return dataset, [event for event in events if isinstance(event, Warned)]


def assert_equal(found, expected):
    """Compares everything that a dataset says."""
    (dataset, warnings), (other, others) = found, expected
    assert warnings == others
    assert dataset.stats == other.stats
    assert len(dataset) == len(other)
    assert dataset.lengths.tolist() == other.lengths.tolist()
    assert (dataset.num_tokens, dataset.largest_id) == (other.num_tokens, other.largest_id)
    assert dataset.closing_ids().tolist() == other.closing_ids().tolist()
    for i in range(len(other)):
        assert dataset.origin(i) == other.origin(i)
        one, two = dataset.sample(i), other.sample(i)
        assert one.input_ids.dtype == two.input_ids.dtype == np.int32
        assert np.array_equal(one.input_ids, two.input_ids)
        assert np.array_equal(one.labels, two.labels)
    assert dataset.fingerprint() == other.fingerprint()


def write_everything(tmp_path):
    """A source of each kind; returns the config."""
    rng = random.Random(1)
    write(tmp_path / "a.jsonl", make_chats(200))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["mr", "ref"])
        table.writerows([say(rng), f"{say(rng)}\n{say(rng)}"] for _ in range(200))
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": say(rng), "completion": say(rng)} for _ in range(200)]))
    (tmp_path / "d.txt").write_text(say(rng, 400))
    (tmp_path / "e.jsonl").write_text(
        "\ufeff\n" + json.dumps({"text": "hello", "messages": make_chats(1)[0]["messages"]})
    )
    names = {"prompt": "mr", "completion": "ref"}
    sources = [
        {"path": str(tmp_path / "a.jsonl")},
        {"path": str(tmp_path / "b.csv"), "columns": names},
        {"path": str(tmp_path / "c.json")},
        {"path": str(tmp_path / "d.txt")},
        {"path": str(tmp_path / "e.jsonl")},
        {"path": str(tmp_path / "a.jsonl"), "limit": 23},
    ]
    return DataConfig.model_validate({"sources": sources, "max_seq_len": 96})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_cache_changes_nothing(tmp_path, tokenizer, monkeypatch, tasks, num_workers):
    monkeypatch.setattr(env, "num_processors", lambda: num_workers)
    data = write_everything(tmp_path)
    with in_memory():
        expected = build(data, tokenizer)
        everything = build(data, tokenizer, "clm")
    assert_equal(build(data, tokenizer), expected)
    assert len(tasks) > 10
    tasks.clear()
    assert_equal(build(data, tokenizer), expected)
    assert tasks == [], "the second time nothing is tokenized"
    if num_workers == 1:
        assert_equal(build(data, tokenizer, "clm"), everything)


def test_files_that_have_not_changed_are_not_read(tmp_path, tokenizer, monkeypatch):
    data = chats(tmp_path)
    os.utime(tmp_path / "a.jsonl", (1e9, 1e9))
    expected = build(data, tokenizer)

    def refuse(source):
        raise AssertionError("the source was opened")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_builder, "cut_source", refuse)
        assert_equal(build(data, tokenizer), expected)
    os.utime(tmp_path / "a.jsonl", (2e9, 2e9))
    assert_equal(build(data, tokenizer), expected)


def test_an_edited_row_tokenizes_its_own_chunk_only(tmp_path, tokenizer, tasks):
    rows = make_chats(500)
    path = write(tmp_path / "a.jsonl", rows)
    data = DataConfig(sources=str(path))
    build(data, tokenizer)
    num_chunks = len(tasks)
    assert num_chunks > 15
    rows[300] = {"messages": [{"role": "user", "content": "edited"}, {"role": "assistant", "content": "row"}]}
    tasks.clear()
    write(path, rows)
    found = build(data, tokenizer)
    assert len(tasks) == 1
    with in_memory():
        assert_equal(found, build(data, tokenizer))
    tasks.clear()
    rows.insert(3, rows[300])
    write(path, rows)
    found = build(data, tokenizer)
    assert len(tasks) <= 3, "chunks after an inserted row keep their borders"
    with in_memory():
        assert_equal(found, build(data, tokenizer))


def test_other_settings_are_other_shards(tmp_path, tokenizer, tokenizer_factory, tasks):
    data = chats(tmp_path, 20)
    prints = set()
    other = tokenizer_factory(chat_template=tokenizer.chat_template.replace("'\n' }}", "'\n\n' }}", 1))
    for config, own in [
        (data, tokenizer),
        (data, other),
        (data.model_copy(update={"system": "Be brief."}), tokenizer),
        (data.model_copy(update={"max_seq_len": 64}), tokenizer),
        (data.model_copy(update={"train_on": "last"}), tokenizer),
    ]:
        tasks.clear()
        prints.add(build(config, own)[0].fingerprint())
        assert tasks
    assert len(prints) == 5


def test_another_language_of_targets_is_another_folder(tmp_path, tokenizer):
    data, folders = chats(tmp_path, 1), set()
    for language in (None, "fr", "de"):
        own = copy.deepcopy(tokenizer)
        own.tgt_lang = language
        folders.add(DataCache(data, own, token_options(data, "seq2seq")).folder)
    assert len(folders) == 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_first_bad_row_is_reported(tmp_path, tokenizer, monkeypatch, num_workers):
    monkeypatch.setattr(env, "num_processors", lambda: num_workers)
    rows = [json.dumps(row) for row in make_chats(300)]
    rows[250] = "{"
    rows[120] = json.dumps({"messages": [{"role": "nobody", "content": "x"}]})
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.csv").write_text("a,b\n1,2,3\n")
    data = DataConfig(sources=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")])
    with in_memory(), pytest.raises(DataError) as expected:
        build(data, tokenizer)
    with pytest.raises(DataError) as caught:
        build(data, tokenizer)
    assert str(caught.value) == str(expected.value)
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:121"


def test_a_bad_row_of_a_table_comes_after_those_before_it(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    (tmp_path / "a.json").write_text(json.dumps(rows) + "]")
    (tmp_path / "b.csv").write_text("a,b\n1,2,3\n")
    data = DataConfig(sources=[str(tmp_path / "a.json"), str(tmp_path / "b.csv")])
    with pytest.raises(DataError) as caught:
        build(data, tokenizer)
    assert caught.value.where == f"{tmp_path / 'a.json'}:row 2"


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, tokenizer, monkeypatch):
    data = chats(tmp_path)
    with in_memory():
        expected, warnings = build(data, tokenizer)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "file"))
    dataset, (first, *others) = build(data, tokenizer)
    assert "cache cannot be written" in first.message
    assert_equal((dataset, others), (expected, warnings))


def test_a_full_disk_is_a_warning_or_an_error(tmp_path, tokenizer, monkeypatch):
    data = chats(tmp_path)
    with in_memory():
        expected, warnings = build(data, tokenizer)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
    try:
        dataset, (first, *others) = build(data, tokenizer)
        assert "cache cannot be written" in first.message
        assert_equal((dataset, others), (expected, warnings))
        monkeypatch.setattr(dataset_builder, "_MEMORY_BYTES", 1000)
        with pytest.raises(DataError, match="too large to be kept in memory") as caught:
            build(data, tokenizer)
        assert "INGLE_CACHE" in str(caught.value.fix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert not list((tmp_path / "cache").rglob("*.partial-*"))


def test_a_damaged_shard_is_tokenized_again(tmp_path, tokenizer, tasks):
    data = chats(tmp_path)
    os.utime(tmp_path / "a.jsonl", (1e9, 1e9))
    expected = build(data, tokenizer)
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[1].write_bytes(b"")
    tasks.clear()
    assert_equal(build(data, tokenizer), expected)
    assert len(tasks) == 2


def test_held_out_rows_are_found_without_reading_the_rows_again(tmp_path, tokenizer):
    data = chats(tmp_path)
    seen = []
    with in_memory():
        build(data, tokenizer, on_example=seen.append)
    answered = [example for example in seen if example.messages[-1].role == "assistant"]
    held_out = [*answered[::40], Example("h:1", (Message("user", "never seen"), Message("assistant", "x")))]
    results = []
    for _ in range(2):
        search = ContaminationSearch(held_out)
        build(data, tokenizer, search=search)
        results.append(search.result())
    expected = ContaminationSearch(held_out)
    for example in seen:
        expected.add(example)
    assert results == [expected.result()] * 2
    assert results[0].same_row == len(held_out) - 1
    again = []
    build(data, tokenizer, on_example=again.append)
    assert again == seen


def test_duplicates_are_those_of_a_dataset_in_memory(tmp_path, tokenizer, monkeypatch):
    """Although hashes come from the shards and only the compared rows are read again."""
    monkeypatch.setattr(duplicates, "MAX_COMPARED", 64)  # every 16th row
    chats(tmp_path)
    rows = (tmp_path / "a.jsonl").read_text().splitlines()
    words = " ".join(f"word{i}" for i in range(30))
    answers = [json.dumps({"prompt": f"q{i % 50}", "completion": f"{words} {i % 90}"}) for i in range(300)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows[:200] + rows[:50] + [rows[199]] * 30))
    (tmp_path / "c.jsonl").write_text("\n".join(answers))
    limits = {"a": None, "b": 270, "c": None}
    data = DataConfig(
        sources=[{"path": str(tmp_path / f"{name}.jsonl"), "limit": limit} for name, limit in limits.items()],
        max_seq_len=128,
    )
    with in_memory():
        expected = inspect(data, tokenizer, Sft()).duplicates
    assert expected.exact > 250
    assert expected.same_prompt > 40
    assert expected.near > 3
    assert expected.near_pairs[0].second.startswith(str(tmp_path))
    for _ in range(2):  # new and known data
        assert inspect(data, tokenizer, Sft()).duplicates == expected


def test_a_tokenizer_that_cannot_be_pickled(tmp_path, tokenizer, monkeypatch, tasks):
    monkeypatch.setattr(env, "num_processors", lambda: 2)
    data = chats(tmp_path, 60)
    with in_memory():
        expected = build(data, tokenizer)
    tokenizer.extra = lambda: None
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(tokenizer)
    assert_equal(build(data, tokenizer), expected)
    assert tasks


def test_progress_ends_with_all_rows(tmp_path, tokenizer):
    for _ in range(2):
        events = []
        build_dataset(chats(tmp_path), tokenizer, objective="sft", sink=events.append)
        assert [e for e in events if isinstance(e, Progress)][-1] == Progress("Tokenizing rows", 300)


def test_a_worker_that_dies_is_an_error(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(env, "num_processors", lambda: 2)
    send_first = worker_pool._send_first

    def kill(process, *first):
        send_first(process, *first)
        process.kill()

    monkeypatch.setattr(worker_pool, "_send_first", kill)
    with pytest.raises(IngleError, match="ended unexpectedly") as caught:
        build(chats(tmp_path), tokenizer)
    assert "signal 9" in str(caught.value.why)


SCRIPT = """
import pickle, sys
from ingle.config.data import DataConfig
from ingle.config.objective import Sft
from ingle import env
from ingle.data import chunks, dataset_builder, worker_pool
env.num_processors = lambda: int(sys.argv[3])
chunks._MIN_BYTES = chunks._MEAN_BYTES = 4000
dataset_builder._CACHED_BYTES = 0
tasks = []
submit = worker_pool.WorkerPool.submit
worker_pool.WorkerPool.submit = lambda pool, task: tasks.append(task) or submit(pool, task)
tokenizer = pickle.load(open(sys.argv[1], "rb"))
dataset = dataset_builder.build_dataset(DataConfig(sources=sys.argv[2]), tokenizer, objective="sft")
print(dataset.fingerprint(), len(tasks), "torch" in sys.modules)
"""


def start(tmp_path, tokenizer, path, num_workers=1):
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenizer))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tokenizer.pickle"), str(path), str(num_workers)],
        env=env.worker_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_together_share_the_work(tmp_path, tokenizer, tasks):
    path = write(tmp_path / "a.jsonl", make_chats(600))
    running = [start(tmp_path, tokenizer, path) for _ in range(2)]
    results = [process.communicate(timeout=120)[0].split() for process in running]
    build(DataConfig(sources=str(path)), tokenizer)
    assert tasks == [], "everything is there"
    assert len({fingerprint for fingerprint, _, _ in results}) == 1
    counts = sorted(int(count) for _, count, _ in results)
    assert counts[0] == 0 and counts[1] > 20, "one of them waits"
    assert {torch for _, _, torch in results} == {"False"}


def test_kill_9_leaves_nothing_half_written(tmp_path, tokenizer, tasks):
    path = write(tmp_path / "a.jsonl", make_chats(1200))
    process = start(tmp_path, tokenizer, path)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").rglob("*.safetensors"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout.read() == "", "it was killed before the end"
    process.stdout.close()
    shards = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(shards) >= 10
    assert all(open_shard(shard) is not None for shard in shards)
    data = DataConfig(sources=str(path))
    found = build(data, tokenizer)
    fresh = len(tasks)
    assert 0 < fresh <= len(list((tmp_path / "cache").rglob("*.safetensors"))) - len(shards) + 8
    with in_memory():
        assert_equal(found, build(data, tokenizer))


def test_ctrl_c_ends_the_workers(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", make_chats(40_000))
    process = start(tmp_path, tokenizer, path, num_workers=2)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").rglob("*.safetensors"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(pid) for pid in (Path("/proc") / f"{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert output == "" and process.returncode != 0, "it was stopped before the end"
    assert not any((Path("/proc") / str(pid)).exists() for pid in children)
    folder = tmp_path / "cache"
    assert not list(folder.rglob("*.partial-*"))
    assert all(open_shard(shard) is not None for shard in folder.rglob("*.safetensors"))


MEASURE = """
import pickle, resource, sys
from ingle.config.data import DataConfig
from ingle.config.objective import Sft
from ingle.data import SequenceSampler, build_dataset, make_sequences
tokenizer = pickle.load(open(sys.argv[1], "rb"))
data = DataConfig(sources=[sys.argv[2]] * int(sys.argv[3]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = build_dataset(data, tokenizer, objective="clm")
sequences = make_sequences(dataset, data, 0)
for documents in SequenceSampler(sequences, 0, True).take(0, 1000):
    for i in documents:
        dataset.sample(int(i))
print(len(dataset), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.sweep
def test_memory_is_a_few_bytes_per_document(tmp_path, tokenizer):
    """The same rows many times over are many documents that are tokenized once."""
    path = write(
        tmp_path / "a.jsonl", [{"text": f"{number} {say(random.Random(number), 12)}"} for number in range(100_000)]
    )
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenizer))
    figures = []
    for times in ("5", "50"):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "tokenizer.pickle"), str(path), times]
        done = subprocess.run(command, env=env.worker_environment(), capture_output=True, text=True, check=True)
        figures.append([int(figure) for figure in done.stdout.split()])
    (few, small), (many, large) = figures
    assert (few, many) == (500_000, 5_000_000)
    assert large < 200e6
    assert (large - small) / (many - few) < 30, "bytes per document, at the peak"
