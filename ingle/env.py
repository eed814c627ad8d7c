"""The one place where the process environment is read or set."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

#: Programs that may run beside ours, on average, before the machine counts as busy.
_BUSY = 0.5


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

    A thread of OpenMP that waits for the others turns for milliseconds before it sleeps, which is the fastest way as
    long as each has a processor of its own.  Where it has not, it keeps the very thread that it waits for from running,
    and a run on a busy machine takes many times as long.  What the user has set stays.  To be called before torch is
    loaded: the library reads this once.
    """
    if not hasattr(os, "sched_getaffinity") or "OMP_WAIT_POLICY" in os.environ:
        return
    free = (os.cpu_count() or 1) - os.getloadavg()[0]
    if free < len(os.sched_getaffinity(0)) - _BUSY:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the library's own choice for too many threads
