"""What is read from and set in the environment."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ingle import env

_BUSY_LOOP = "print(flush=True)\nwhile True: pass"
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_caches_are_bounded_where_the_user_has_said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.setenv(CACHES[1], "restored afterwards")
    monkeypatch.delenv(CACHES[1])
    env.limit_primitive_caches(128)
    assert [env.os.environ[name] for name in CACHES] == ["7", "128"]


@pytest.mark.parametrize(
    ("running", "ours", "said", "expected"),
    [
        pytest.param([1, 1, 2, 1, 1, 1], 4, {}, None, id="quiet"),
        pytest.param([3, 3, 2, 3, 3, 2], 4, {}, "1000", id="busy"),
        pytest.param([3, 3, 3, 3, 3, 3], 2, {}, None, id="busy, and room for ours"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {}, "1000", id="no room"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {"GOMP_SPINCOUNT": "7"}, "7", id="the user has said how long to wait"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {"OMP_WAIT_POLICY": "active"}, None, id="the user has said how to wait"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {"OMP_NUM_THREADS": "1"}, None, id="one thread waits for nobody"),
    ],
)
def test_threads_give_way_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, running: list[int], ours: int, said: dict[str, str], expected: str | None
) -> None:
    clear(monkeypatch, said)
    looks = iter(running)
    monkeypatch.setattr(env.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(env.os, "getloadavg", lambda: (9.0, 9.0, 9.0))  # of what has ended: does not count
    monkeypatch.setattr(env, "_count_running", lambda: next(looks))
    monkeypatch.setattr(env, "_processor_quota", lambda: math.inf)
    monkeypatch.setattr(env.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(env.os, "sched_getaffinity", lambda process: set(range(ours)))
    env.share_processors()
    assert env.os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_container_may_use_less_than_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], processors: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(env, "Path", lambda path: tmp_path / Path(path).relative_to("/sys/fs/cgroup"))
    assert env._processor_quota() == processors


def test_a_program_that_runs_now_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", _BUSY_LOOP], stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        free = env._free_processors()
        busy.kill()
    assert free <= (env.os.cpu_count() or 1) - 0.5


def test_collection_is_put_off_until_the_libraries_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        env.collect_as_usual()  # nothing was put off: a library's user keeps what they have set
        assert (gc.get_threshold(), gc.get_freeze_count()) == (usual, frozen)
        env.put_off_collection()
        assert gc.get_threshold()[0] > 1_000_000
        env.collect_as_usual()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def clear(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    """The environment of a user who has said this and nothing else."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)


def test_an_extra_is_installed_where_the_program_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(env.__file__).parents[1]
    monkeypatch.chdir(root)
    assert env.install_command("llama") == "make judge"
    assert env.install_command("wandb").endswith("-m pip install -e '.[wandb]'")
    monkeypatch.chdir(tmp_path)
    assert env.install_command("llama") == f"make -C {root} judge"
    monkeypatch.setattr(env, "__file__", str(tmp_path / "site-packages" / "ingle" / "env.py"))
    assert env.install_command("llama") == "pip install 'ingle[llama]'"
