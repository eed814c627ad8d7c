"""The one place where the process environment is read or set."""

from __future__ import annotations

import gc
import math
import os
import shlex
import sys
import time
from pathlib import Path

#: Threads of other programs that may run, on average of a few looks, before the machine counts as busy.
_BUSY = 0.5
_SAMPLES = 6
_PAUSE_S = 0.004


#: Containers made before the garbage collector runs while libraries load: torch and transformers make 0.8 million.
_WHILE_LOADING = 2_000_000
_THRESHOLDS = gc.get_threshold()


def put_off_collection() -> None:
    """Keeps the garbage collector from running while libraries load; :func:`collect_as_usual` ends that.

    Importing makes hundreds of thousands of objects that stay, and each collection visits all of them to find nothing:
    a quarter of the time that torch and transformers take to load.
    """
    gc.set_threshold(_WHILE_LOADING, *_THRESHOLDS[1:])


def collect_as_usual() -> None:
    """Ends what :func:`put_off_collection` began, if it did: what is loaded by now stays and is visited no more."""
    if gc.get_threshold()[0] == _WHILE_LOADING:
        gc.freeze()
        gc.set_threshold(*_THRESHOLDS)


def install_command(extra: str) -> str:
    """What to type to install an extra of this package: in a source checkout, or with pip.

    Args:
        extra: A name of ``[project.optional-dependencies]``.
    """
    root = Path(__file__).resolve().parents[1]
    if not all((root / name).is_file() for name in ("Makefile", "pyproject.toml", "constraints.txt")):
        return f"pip install 'ingle[{extra}]'"
    inside = Path.cwd() == root
    if extra == "llama":
        return "make judge" if inside else f"make -C {shlex.quote(str(root))} judge"
    target = shlex.quote(f"{'.' if inside else root}[{extra}]")
    return f"{shlex.quote(sys.executable)} -m pip install -e {target}"


def hub_offline() -> bool:
    """Whether the user asked for no hub access (``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``)."""
    return any(
        os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def limit_primitive_caches(count: int) -> None:
    """Has oneDNN, and torch's layer above it, keep at most ``count`` compiled matrix products each.

    Packed rows differ in length, so nearly every micro-batch brings shapes of its own, and each costs about a
    megabyte that would be kept for the next thousand.  What the user has set stays; so does a cache already in use.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(count))


def share_processors() -> None:
    """Has threads that wait for one another give way soon, where other programs want the same processors.

    A thread of OpenMP that waits for the others spins for milliseconds before it sleeps, which is the fastest way as
    long as each has a processor of its own.  Where it has not, it keeps the very thread that it waits for from running,
    and a run on a busy machine takes many times as long.  What counts is what runs now: a load average still holds the
    program that has just ended.  What the user has set stays.  To be called before torch is loaded: the library reads
    this once.  Takes 20 milliseconds.
    """
    if not hasattr(os, "sched_getaffinity") or "OMP_WAIT_POLICY" in os.environ:
        return
    said = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(int(said) if said.isdigit() else sys.maxsize, len(os.sched_getaffinity(0)))
    if threads > 1 and _free_processors() < threads - _BUSY:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the library's own choice for too many threads


def _free_processors() -> float:
    """Processors that no other program uses now, and at most as many as the container may use."""
    samples = []
    for number in range(_SAMPLES):
        if number:
            time.sleep(_PAUSE_S)
        samples.append(_count_running())
    others = max(0.0, sum(samples) / _SAMPLES - 1)  # one of them is this process
    return min((os.cpu_count() or 1) - others, _processor_quota())


def _count_running() -> int:
    """Threads of all programs that run or could run at this moment."""
    try:
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1


def _processor_quota() -> float:
    """Processors whose time this process's container may use; no limit on a plain system."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            files = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
            quota, period = (file.read_text(encoding="ascii").strip() for file in files)
        except OSError:
            return math.inf
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf
