"""What is read from and set in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle import env

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_caches_are_bounded_where_the_user_has_said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.setenv(CACHES[1], "restored afterwards")
    monkeypatch.delenv(CACHES[1])
    env.limit_primitive_caches(128)
    assert [env.os.environ[name] for name in CACHES] == ["7", "128"]


@pytest.mark.parametrize(
    ("load", "ours", "said", "expected"),
    [
        (0.3, 4, {}, None),
        (1.8, 4, {}, "1000"),
        (1.8, 2, {}, None),
        (6.0, 2, {}, "1000"),
        (6.0, 2, {"GOMP_SPINCOUNT": "7"}, "7"),
        (6.0, 2, {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_give_way_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, load: float, ours: int, said: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(env.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(env.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(env.os, "sched_getaffinity", lambda process: set(range(ours)))
    env.share_processors()
    assert env.os.environ.get("GOMP_SPINCOUNT") == expected


def test_an_extra_is_installed_where_the_program_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(env.__file__).parents[1]
    monkeypatch.chdir(root)
    assert env.install_command("llama") == "make judge"
    assert env.install_command("wandb").endswith("-m pip install -e '.[wandb]'")
    monkeypatch.chdir(tmp_path)
    assert env.install_command("llama") == f"make -C {root} judge"
    monkeypatch.setattr(env, "__file__", str(tmp_path / "site-packages" / "ingle" / "env.py"))
    assert env.install_command("llama") == "pip install 'ingle[llama]'"
