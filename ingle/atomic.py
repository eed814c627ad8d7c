"""Files and folders that are either complete or absent: write under another name, fsync, rename; and their digests."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from ingle.errors import CheckpointError
from ingle.stopping import renaming, undone

#: What the system says when nothing more can be written.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    with disk_full_explained(path), undone(lambda: partial.unlink(missing_ok=True)):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with renaming:
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
    replaced = path.with_name(f"{path.name}.partial-{os.getpid()}-replaced")
    with disk_full_explained(path), undone(lambda: _remove(partial, replaced)):
        try:
            _remove(partial, replaced)  # of a killed process that had our number
            partial.mkdir(parents=True)
            yield partial
            for entry in partial.rglob("*"):
                sync(entry)
            sync(partial)
            with renaming:
                if path.exists():
                    os.replace(path, replaced)
                os.replace(partial, path)
        finally:
            if replaced.exists() and not path.exists():  # interrupted between the two renames
                os.replace(replaced, path)
            _remove(partial, replaced)
    sync(path.parent)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields a new folder inside ``parent`` that is gone afterwards, however the program ends short of SIGKILL."""
    with TemporaryDirectory(dir=parent, prefix=prefix) as name, undone(lambda: _remove(Path(name))):
        yield Path(name)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Names the file and what to do when the disk is full while the block writes ``path``.

    Raises:
        CheckpointError: It is full, or the user's share of it is.
    """
    try:
        yield
    except Exception as error:
        reason = _why_full(error)
        if reason is None:
            raise
        raise CheckpointError(
            "The disk is full. Files that were complete before are untouched.",
            where=str(path),
            why=f"{os.strerror(reason)}; {shutil.disk_usage(path.parent).free:,} bytes are free",
            fix="free some space and run the same command again; a training run continues from its last checkpoint",
        ) from error


def _why_full(error: Exception) -> int | None:
    """The system's number for a full disk, a full quota or a file above the allowed size; None for other errors."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _FULL else None
    # Libraries written in Rust (safetensors) keep the system's error in their text alone.
    return next((number for number in _FULL if f"(os error {number})" in str(error)), None)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
