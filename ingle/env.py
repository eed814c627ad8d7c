"""The one place where the process environment is read."""

from __future__ import annotations

import os
from pathlib import Path


def hub_offline() -> bool:
    """Whether the user asked for no hub access (``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``)."""
    return any(
        os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def cache_dir() -> Path:
    """Where Ingle keeps what it can make again: ``INGLE_CACHE``, else ``~/.cache/ingle``."""
    return Path(os.environ.get("INGLE_CACHE", "~/.cache/ingle")).expanduser()
