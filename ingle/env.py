"""The one place where the process environment is read or set."""

from __future__ import annotations

import os


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
