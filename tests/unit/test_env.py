"""What is read from and set in the environment."""

from __future__ import annotations

import pytest

from ingle import env

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_caches_are_bounded_where_the_user_has_said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.setenv(CACHES[1], "restored afterwards")
    monkeypatch.delenv(CACHES[1])
    env.limit_primitive_caches(128)
    assert [env.os.environ[name] for name in CACHES] == ["7", "128"]
