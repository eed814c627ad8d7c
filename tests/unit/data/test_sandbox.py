"""Chat templates that fail, never end or take all memory: an error within seconds that names the line."""

from __future__ import annotations

import json
import resource
import signal
import threading

import pytest

from ingle.config.data import DataConfig
from ingle.data import build_dataset, quota, sandbox
from ingle.data.quota import OutOfTime, Quota
from ingle.data.template import locate_answers, render
from ingle.data.types import Message
from ingle.errors import DataError, ModelError

TURN = (Message("user", "what"), Message("assistant", "four"))
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(t='x') %}{% for i in range(64) %}\n{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"


@pytest.mark.parametrize(
    ("template", "message", "line"),
    [
        ("\n\n" + LOOP, "too much time", 3),
        (DOUBLING, "too much memory", 2),
        ("{{ 'x' * 10000000000 }}", "too much memory", 1),
        ("\n{{ 'x'|center(3000000) }}", "too long", None),
        ("\n{{ 10 ** messages|length }}", "power", 2),
        ("{{ 10\n|round(100000000, 'ceil') }}", "power", 2),
        ("{{ [1]|map('round', 100000000, 'ceil')|list }}", "power", 1),
        ("x\n{% for %}", "not valid Jinja", 2),
        ("{% if a %}" * 5000, None, None),
        ("{{ " + "(" * 50_000 + "1", None, None),
    ],
    ids=["loop", "doubling", "repeat", "wide", "power", "round", "map", "syntax", "open", "nested"],
)
def test_errors_in_a_template_name_its_line(tokenizer, monkeypatch, template, message, line):
    monkeypatch.setattr(sandbox, "TIME_S", 0.3 if message == "too much time" else 60)
    monkeypatch.setattr(sandbox, "MEMORY_BYTES", 1 << 26)
    tokenizer.chat_template = template
    with pytest.raises((ModelError, DataError), match=message) as caught:
        locate_answers(tokenizer, TURN, train_on="last", origin="t.jsonl:7")
    if line is not None:
        assert caught.value.where == f"model.chat_template, line {line}"


@pytest.mark.parametrize(
    "template",
    [
        "\n{{ raise_exception('no') }}",
        "\n{{ messages[5].content.x }}",
        "\n{{ range(10 * 1000 * 1000) }}",
        "\n{{ 1 // 0 }}",
        "\n{{ messages.append(1) }}",
        "\n{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "\n{{ 'x'.encode('nope') }}",
    ],
    ids=["refusal", "undefined", "range", "zero", "mutation", "recursion", "lookup"],
)
def test_a_template_that_raises_refuses_the_row(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="refuses") as caught:
        render(tokenizer, TURN, origin="t.jsonl:7")
    assert caught.value.where == "t.jsonl:7"
    assert "model.chat_template, line 2" in str(caught.value.why)


def test_the_file_of_the_template_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = "x\n{{ nothing.here }}"
    tokenizer.save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(DataError) as caught:
        render(tokenizer, TURN)
    assert f"{tmp_path / 'chat_template.jinja'}:2" in str(caught.value.why)


def test_a_dataset_sets_limits_once_per_batch_and_reads_the_template_file_once(tokenizer, tmp_path, monkeypatch):
    entered, read = [], []

    class CountingQuota(Quota):
        def __enter__(self):
            entered.append(self)
            return super().__enter__()

    monkeypatch.setattr(sandbox, "Quota", CountingQuota)
    monkeypatch.setattr(sandbox, "_read_text", lambda file: read.append(file))
    # The template refuses the prompt of every row.
    refusal = "{% if messages|length == 1 %}{{ raise_exception('a single message') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in TURN]}] * 40
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig.model_validate({"sources": [str(tmp_path / "a.jsonl")]})
    assert len(build_dataset(data, tokenizer, objective="sft")) == 40
    assert 0 < len(entered) < 5 and 0 < len(read) < 5


def test_unpacked_arguments_are_no_power(tokenizer):
    tokenizer.chat_template = "{% set round = 3 %}{{ dict(a=1, **{'b': round}).b }}"
    assert render(tokenizer, TURN) == "3"


def test_limits_leave_no_trace():
    former = (resource.getrlimit(resource.RLIMIT_AS), *map(signal.getsignal, (signal.SIGPROF, signal.SIGINT)))
    with pytest.raises(ZeroDivisionError), Quota(1 << 30) as limits, limits.limited(1):
        raise ZeroDivisionError
    assert former == (
        resource.getrlimit(resource.RLIMIT_AS),
        *map(signal.getsignal, (signal.SIGPROF, signal.SIGINT)),
    )
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_ctrl_c_ends_a_block_although_its_handler_only_takes_a_note(monkeypatch):
    monkeypatch.setattr(quota, "_TICK_S", 0.02)
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)

    former = signal.signal(signal.SIGINT, note)
    try:
        with pytest.raises(KeyboardInterrupt), Quota(1 << 30) as limits, limits.limited(60):
            while signal.getsignal(signal.SIGINT) is note:  # until the block has run for a while
                pass
            signal.raise_signal(signal.SIGINT)
            while True:
                pass
    finally:
        signal.signal(signal.SIGINT, former)
    assert noted == [signal.SIGINT]


def test_elsewhere_than_in_the_main_thread_memory_is_limited():
    found: list[BaseException] = []

    def work() -> None:
        try:
            with Quota(1 << 26) as limits, limits.limited(1):
                bytes(1 << 30)
        except (MemoryError, OutOfTime) as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in found] == [MemoryError]
