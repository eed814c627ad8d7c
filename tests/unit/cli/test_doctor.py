from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ingle.cli import doctor
from ingle.cli.exit_status import run_command


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MEASURE_S", 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_json_contains_all_measurements(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["memory"]["total_bytes"] > report["memory"]["available_bytes"] > 0
    assert report["hub"] == "offline"
    cpu = report["devices"][0]
    assert cpu["kind"] == "cpu" and cpu["cores"] >= 1
    assert [name for name in cpu["features"] if not torch.cpu.get_capabilities()[name]] == []
    assert set(cpu["rates"]) == set(doctor._RATE_WORDS)
    assert all(rate > 0 for rate in cpu["rates"].values())


def test_the_text_lists_every_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rates: dict[str, Any] = dict.fromkeys(doctor._RATE_WORDS, 2.5e9)
    monkeypatch.setattr(doctor, "_rates", lambda device: rates)
    assert run_command(["doctor"]) == 0
    out = capsys.readouterr().out
    for title, _, unit in doctor._RATE_WORDS.values():
        assert f"{title:<22}      2.5 {unit}" in out
    assert "disabled by HF_HUB_OFFLINE" in out


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail() -> Any:
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "get_session", fail)
    assert doctor._ask_hub() == "unreachable"


def test_median_time_of_work() -> None:
    calls: list[int] = []
    doctor._seconds(lambda: calls.append(1), torch.device("cpu"))
    assert len(calls) == 4  # one to warm up, three to take the median of
