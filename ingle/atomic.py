"""Files and folders that are either whole or not there: write beside, fsync, rename; and whether they still are."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ingle.errors import CheckpointError


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a reader or a crash sees the old content or the new, never a part.

    Raises:
        CheckpointError: When the disk is full.
    """
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write; on success it becomes ``path``, replacing what was there.

    Raises:
        CheckpointError: When the disk is full; ``path`` is then as it was.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with _disk_full_is_told(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; on success it becomes ``path``, replacing what was there.

    Raises:
        CheckpointError: When the disk is full; ``path`` is then as it was.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with _disk_full_is_told(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had our number
            partial.mkdir(parents=True)
            yield partial
            for entry in partial.rglob("*"):
                sync(entry)
            sync(partial)
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_full_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise CheckpointError(
            "the disk is full; what was complete before is untouched.",
            where=str(path),
            why=f"{shutil.disk_usage(path.parent).free:,} bytes are free",
            fix="free some space and run the same command again; training goes on from its last checkpoint",
        ) from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries written in Rust (safetensors) keep the system's error in their text alone.
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
