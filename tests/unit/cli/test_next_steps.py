"""What follows a run: commands that work when they are pasted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from ingle.cli.exit_status import run_command
from ingle.cli.training import command_name, next_steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my runs" / "it's"
    (folder / "adapter").mkdir(parents=True)
    (folder / "report.html").touch()
    (folder / "adapter" / "tokenizer_config.json").write_text("{}")
    return folder


def test_paths_survive_the_shell_and_only_what_works_is_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/elsewhere/ingle"])
    (run / "export").mkdir()
    commands = {purpose: shlex.split(line) for purpose, line in next_steps(run)}
    assert list(commands) == ["report", "continue a text", "export"]
    assert str(run / "report.html") in commands["report"]
    assert commands["export"][:3] == ["/elsewhere/ingle", "export", str(run)]
    assert commands["export"][-1] == str(run / "export-2"), "an export overwrites nothing"
    (run / "adapter" / "chat_template.jinja").touch()
    assert [purpose for purpose, _ in next_steps(run)] == ["report", "chat", "answer", "export"]


def test_every_command_exists_with_its_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _, line in next_steps(run)[1:]:
        words = shlex.split(line)
        run_command([*words[words.index(str(run)) - 1 :], "--help"])
        assert "Usage" in capsys.readouterr().out


def test_the_command_is_named_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / ".venv" / "bin" / "ingle"
    script.parent.mkdir(parents=True)
    script.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert command_name() == ".venv/bin/ingle"
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_name() == "ingle"
    monkeypatch.setattr(sys, "argv", ["/site/ingle/__main__.py"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert command_name() == "/usr/bin/python3 -m ingle"
