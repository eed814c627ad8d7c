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


def test_caches_are_limited_unless_the_user_has_set_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
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
        pytest.param([3, 3, 3, 3, 3, 3], 2, {}, None, id="busy, with enough processors"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {}, "1000", id="too few processors"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {"GOMP_SPINCOUNT": "7"}, "7", id="user has set the spin count"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {"OMP_WAIT_POLICY": "active"}, None, id="user has set the policy"),
        pytest.param([7, 7, 7, 7, 7, 7], 2, {"OMP_NUM_THREADS": "1"}, None, id="one thread"),
    ],
)
def test_spinning_is_limited_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, running: list[int], ours: int, said: dict[str, str], expected: str | None
) -> None:
    clear(monkeypatch, said)
    looks = iter(running)
    monkeypatch.setattr(env.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(env.os, "getloadavg", lambda: (9.0, 9.0, 9.0))  # includes ended programs: must not count
    monkeypatch.setattr(env, "_count_running", lambda: next(looks))
    monkeypatch.setattr(env, "_processor_quota", lambda: math.inf)
    monkeypatch.setattr(env.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(env.os, "sched_getaffinity", lambda process: set(range(ours)))
    env.limit_spinning()
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
def test_the_quota_of_a_container_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], processors: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(env, "Path", lambda path: tmp_path / Path(path).relative_to("/sys/fs/cgroup"))
    assert env._processor_quota() == processors


def test_a_running_program_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", _BUSY_LOOP], stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        free = env._free_processors()
        busy.kill()
    assert free <= (env.os.cpu_count() or 1) - 0.5


def test_garbage_collection_is_deferred_during_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        env.restore_garbage_collection()  # not deferred: keeps the settings of the program
        assert (gc.get_threshold(), gc.get_freeze_count()) == (usual, frozen)
        env.defer_garbage_collection()
        assert gc.get_threshold()[0] > 1_000_000
        env.restore_garbage_collection()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def clear(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    """Sets these variables and no others."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)


def test_the_install_command_depends_on_the_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(env.__file__).parents[1]
    monkeypatch.chdir(root)
    assert env.install_command("llama") == "make judge"
    assert env.install_command("wandb").endswith("-m pip install -e '.[wandb]'")
    monkeypatch.chdir(tmp_path)
    assert env.install_command("llama") == f"make -C {root} judge"
    monkeypatch.setattr(env, "__file__", str(tmp_path / "site-packages" / "ingle" / "env.py"))
    assert env.install_command("llama") == "pip install 'ingle[llama]'"
