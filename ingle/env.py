"""Reads and sets the process environment; the only module that does."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ingle.errors import ConfigError

#: Average number of running threads of other programs from which the machine counts as busy.
_BUSY = 0.5
#: Variable that names the process of ``ingle train`` to a rank that it has started.
_PARENT = "INGLE_PARENT"
_NUM_SAMPLES = 6
_PAUSE_S = 0.004
#: Threshold of the garbage collector during imports: torch and transformers allocate 0.8 million containers.
_WHILE_LOADING = 2_000_000
_THRESHOLDS = gc.get_threshold()


def defer_garbage_collection() -> None:
    """Prevents garbage collection during imports, until :func:`restore_garbage_collection`.

    Imports allocate hundreds of thousands of permanent objects. Visiting them in every collection takes a quarter of
    the import time of torch and transformers.
    """
    gc.set_threshold(_WHILE_LOADING, *_THRESHOLDS[1:])


def restore_garbage_collection() -> None:
    """Ends :func:`defer_garbage_collection`, if it is active, and exempts all objects so far from collections."""
    if gc.get_threshold()[0] == _WHILE_LOADING:
        gc.freeze()
        gc.set_threshold(*_THRESHOLDS)


def install_command(extra: str) -> str:
    """Returns the command that installs an extra of this package, in a source checkout or with pip."""
    root = Path(__file__).resolve().parents[1]
    if not all((root / name).is_file() for name in ("Makefile", "pyproject.toml", "constraints.txt")):
        return f"pip install 'ingle[{extra}]'"
    inside = Path.cwd() == root
    if extra == "llama":
        return "make judge" if inside else f"make -C {shlex.quote(str(root))} judge"
    target = shlex.quote(f"{'.' if inside else root}[{extra}]")
    return f"{shlex.quote(sys.executable)} -m pip install -e {target}"


def hub_offline() -> bool:
    """Returns whether hub access is disabled (``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``)."""
    return any(
        os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def config_folder() -> Path:
    """Returns the folder of the user's own tables: ``$XDG_CONFIG_HOME/ingle`` or ``~/.config/ingle``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ingle"


def hub_cache() -> Path:
    """Returns the folder in which huggingface_hub keeps what it downloaded, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


class RankPlace(NamedTuple):
    """Which process of a distributed run this is.

    Attributes:
        rank: Its number, from 0.
        world_size: Number of processes.
        local_rank: Its number on its machine.
        local_world_size: Processes on its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def is_rank() -> bool:
    """Returns whether a launcher such as torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_from_environment() -> RankPlace | None:
    """Returns the place of this process as torchrun and compatible launchers set it; None outside of them.

    Raises:
        ConfigError: The variables contradict one another.
    """
    if not is_rank():
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = {name: os.environ[name] for name in names if name in os.environ}
    rank, world_size, local_rank, local_world_size = (
        int(text) if text.isdigit() else -1
        for text in (texts.get(name, texts["RANK" if "RANK" in name else "WORLD_SIZE"]) for name in names)
    )
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise ConfigError(
            "The environment describes an impossible set of processes.",
            where=", ".join(f"{name}={text}" for name, text in texts.items()),
            fix="start the run with `ingle train` or torchrun, or unset these variables",
        )
    return RankPlace(rank, world_size, local_rank, local_world_size)


class NodePlace(NamedTuple):
    """Which machine of a run this is.

    Attributes:
        number: Its number, from 0.
        num_nodes: Machines of the run.
        address: Host at which the ranks meet.
        port: Port at which the ranks meet.
    """

    number: int
    num_nodes: int
    address: str
    port: int


def node_from_environment() -> NodePlace | None:
    """Returns the place of this machine in a run on several machines; None on a single one.

    ``NNODES``, ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK`` (or SLURM's ``SLURM_NODEID``) set it.

    Raises:
        ConfigError: A variable is missing or invalid.
    """
    num_nodes = os.environ.get("NNODES", "1")
    if num_nodes == "1":
        return None
    number = os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", ""))
    if not (num_nodes.isdigit() and number.isdigit() and int(number) < int(num_nodes)):
        raise ConfigError(
            "The environment does not say which machine of the run this is.",
            where=f"NNODES={num_nodes}, NODE_RANK={number}",
            fix="NODE_RANK=0 on the first machine, NODE_RANK=1 on the second, and so on",
        )
    address, port = meeting_point()
    return NodePlace(int(number), int(num_nodes), address, port)


def for_rank(
    place: RankPlace, address: str, port: int, *, attempt: int = 0, parent: int | None = None
) -> dict[str, str]:
    """Returns the environment of a process that is a rank of a run.

    Args:
        place: Which rank it is.
        address: Host on which rank 0 listens.
        port: Port on which rank 0 listens.
        attempt: How often the ranks were started before.
        parent: Process with which the rank ends, if it is on the same machine.
    """
    ranks = {f"{name.upper()}": str(value) for name, value in place._asdict().items()}
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    threads = str(max(1, count_processors() // place.local_world_size))
    limits = {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    others = {} if parent is None else {_PARENT: str(parent), "PYTHONFAULTHANDLER": "1"}
    return os.environ | ranks | meeting | limits | others


def parent_process() -> int | None:
    """Returns the process of ``ingle train`` that started this rank; None for other processes."""
    text = os.environ.get(_PARENT, "")
    return int(text) if text.isdigit() else None


def meeting_point() -> tuple[str, int]:
    """Returns the host and port at which the ranks of a run meet.

    Raises:
        ConfigError: The launcher has not set them.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise ConfigError(
            "The ranks cannot find one another.",
            where=f"MASTER_ADDR={address}, MASTER_PORT={port}",
            fix="start the run with `ingle train` or torchrun, or set both variables on every rank",
        )
    return address, int(port)


def launcher_hosts_store() -> bool:
    """Returns whether torchrun itself listens at the meeting point, instead of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restart_count() -> str:
    """Returns how often the launcher has started the ranks again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def code_digest() -> str:
    """Returns 12 hexadecimal digits that differ if the source code of this package differs. Takes 10 milliseconds."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def count_processors() -> int:
    """Returns the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus() -> int:
    """Returns the NVIDIA GPUs that this process may use, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return min(present, len(list(Path("/dev").glob("nvidia[0-9]*"))))  # a container may have some of them


def cache_folder() -> Path:
    """Returns the folder for files that can be made again: ``INGLE_CACHE``, or ``ingle`` in the user's cache folder."""
    own = os.environ.get("INGLE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingle"


def num_processors() -> int:
    """Returns the number of processors that this process may use, at most the quota of the container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, math.ceil(min(_processor_quota(), count))))


def child_environment() -> dict[str, str]:
    """Returns the environment of a Python process that finds the same modules as this one."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def single_thread_environment() -> dict[str, str]:
    """Returns the environment of a process with one thread and the same modules."""
    return child_environment() | {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def worker_environment() -> dict[str, str]:
    """Returns the environment of a process that tokenizes rows: one thread, no torch, the same modules."""
    return single_thread_environment() | {"USE_TORCH": "0"}  # transformers does not import torch


def secret(name: str) -> str | None:
    """Returns the value of an environment variable that the user has named, such as the key of a server."""
    return os.environ.get(name)


def limit_primitive_caches(count: int) -> None:
    """Limits the caches of compiled matrix products in oneDNN and torch to ``count`` entries each.

    Packed rows differ in length, so nearly every micro-batch adds shapes, and each entry takes about a megabyte. Keeps
    limits that the user has set. Has no effect once the caches are in use.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(count))


def limit_spinning() -> None:
    """Makes waiting OpenMP threads sleep early on a busy machine; call this before torch is imported.

    A waiting OpenMP thread spins for milliseconds before it sleeps. That is fastest if every thread has a processor of
    its own. On a busy machine, spinning threads delay the threads that they wait for, which multiplies the time of a
    run. The decision uses the number of threads that run now, because a load average also covers programs that have
    ended. Settings of the user are kept. Takes 20 milliseconds.
    """
    if not hasattr(os, "sched_getaffinity") or "OMP_WAIT_POLICY" in os.environ:
        return
    setting = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(int(setting) if setting.isdigit() else sys.maxsize, len(os.sched_getaffinity(0)))
    if threads > 1 and _free_processors() < threads - _BUSY:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # what the library uses for too many threads


def _free_processors() -> float:
    """Returns the processors that no other program uses now, at most the quota of the container."""
    total = _count_running()
    for _ in range(_NUM_SAMPLES - 1):
        time.sleep(_PAUSE_S)
        total += _count_running()
    others = max(0.0, total / _NUM_SAMPLES - 1)  # one of them is this process
    return min((os.cpu_count() or 1) - others, _processor_quota())


def _count_running() -> int:
    """Returns the number of running and runnable threads of all programs."""
    try:
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1


def _processor_quota() -> float:
    """Returns the processors that the container may use; infinity outside of containers."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            files = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
            quota, period = (file.read_text(encoding="ascii").strip() for file in files)
        except OSError:
            return math.inf
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf
