"""Paths of an export's files, which are written completely or not at all.

An export is a new folder, or a GGUF file with companion files.  A folder in the layout of the hub is one model, and its
files have the names that the hub and other programs expect.  GGUF files of several types often share a folder, so the
companions of each are named after it.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

from ingle.atomic import atomic_folder, scratch_folder, sync
from ingle.errors import ConfigError, DoesNotFit
from ingle.stopping import on_forced_exit, renaming
from ingle.wording import size

Companion = Literal["card", "modelfile", "fidelity", "fidelity_page", "certificate"]

#: Names of companions: in a folder that is one model, and as suffixes to the stem of a GGUF file.
_NAMES: dict[Companion, tuple[str, str]] = {
    "card": ("README.md", ".md"),
    "modelfile": ("Modelfile", ".Modelfile"),
    "fidelity": ("fidelity.json", ".fidelity.json"),
    "fidelity_page": ("fidelity.md", ".fidelity.md"),
    "certificate": ("certificate.json", ".certificate.json"),
}


class OutputPaths:
    """Paths of one export, and their creation.

    Args:
        out: A folder, or a file whose name ends in ``.gguf``.
        stem: Name of the GGUF file in a folder, without its suffix; None if the export is a folder.
        companions: Files to be written with it.

    Attributes:
        folder: Output folder.
        main: Name of the GGUF file; None if the export is a folder.

    Raises:
        ConfigError: A file would be overwritten, or the export is a folder and ``out`` a file.
    """

    def __init__(self, out: Path, stem: str | None, companions: Collection[Companion] = tuple(_NAMES)) -> None:
        is_file = out.suffix.lower() == ".gguf" and not out.is_dir()
        if is_file and stem is None:
            raise ConfigError("This export is a folder, not a .gguf file.", where=f"--out {out}", fix="name a folder")
        self.folder = out.parent if is_file else out
        self.main = out.name if is_file else (None if stem is None else f"{stem}.gguf")
        self._companions = companions
        self._out = out
        self._require_free()

    @property
    def result(self) -> Path:
        """The GGUF file, or the folder."""
        return self.folder if self.main is None else self.folder / self.main

    def name(self, companion: Companion) -> str:
        """Returns the file name of a companion."""
        in_folder, suffix = _NAMES[companion]
        return in_folder if self.main is None else Path(self.main).stem + suffix

    def path(self, companion: Companion) -> Path:
        """Returns the final path of a companion."""
        return self.folder / self.name(companion)

    def files(self) -> dict[str, str]:
        """Returns the paths of the files that exist, by their kind."""
        found = {kind: self.path(kind) for kind in _NAMES}
        return {"model": str(self.result)} | {kind: str(path) for kind, path in found.items() if path.is_file()}

    def require_bytes(self, needed: int) -> None:
        """Checks that the disk has enough free space.

        Raises:
            DoesNotFit: The disk has less free space than ``needed``.
        """
        folder = self.folder.absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        needed += 16 << 20
        if needed > free:
            raise DoesNotFit(
                f"This export needs {size(needed)} of disk space; {size(free)} are free.",
                where=f"--out {self._out}",
                fix="free some space, name a folder on another disk, or choose a smaller --type",
            )

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Yields a temporary folder; when the block succeeds, its files move to their paths, the main file last.

        If the block fails, neither incomplete files nor new folders remain.
        """
        self._remove_leftovers()
        folder = self.folder.absolute()
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        complete = self.folder if self.main is None else self._temporary("whole")

        def clean() -> None:
            if self.main is not None:
                shutil.rmtree(complete, ignore_errors=True)
            for path in created:
                with suppress(OSError):  # another program has written files there
                    path.rmdir()

        try:
            with on_forced_exit(clean):
                with atomic_folder(complete) as partial:
                    yield partial
                    self._require_free()  # another program may have written there meanwhile
                if self.main is not None:
                    self._move(complete)
        except BaseException:
            clean()
            raise

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yields a temporary folder on the same disk; after a crash, the next export to these paths removes it."""
        path = self._temporary("scratch")
        with scratch_folder(path.parent, f"{path.name}-") as folder:
            yield folder

    def _temporary(self, purpose: str) -> Path:
        return self.result.with_name(f"{self.result.name}.partial-{os.getpid()}-{purpose}")

    def _move(self, complete: Path) -> None:
        """Moves the files to their paths, or none of them if it is interrupted."""
        moved = []
        try:
            with renaming:
                for entry in sorted(complete.iterdir(), key=lambda entry: entry.name == self.main):
                    os.replace(entry, self.folder / entry.name)
                    moved.append(self.folder / entry.name)
            sync(self.folder)
        except BaseException:
            for path in moved:
                path.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(complete, ignore_errors=True)

    def _require_free(self) -> None:
        existing = self._existing()
        if existing is not None:
            raise ConfigError(
                f"{existing} already exists; nothing is overwritten.",
                where=f"--out {self._out}",
                fix=f"delete it, or use --out {self._alternative()}",
            )

    def _existing(self) -> Path | None:
        """Returns a path that would be overwritten, if any."""
        if self.main is not None and (self.folder.is_dir() or not self.folder.exists()):
            return next((path for path in (self.result, *map(self.path, self._companions)) if path.exists()), None)
        free = not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))
        return None if free else self.folder

    def _alternative(self) -> Path:
        taken = self.result if self.folder.is_dir() or not self.folder.exists() else self.folder
        number = 2
        while (path := taken.with_name(f"{taken.stem}-{number}{taken.suffix}")).exists():
            number += 1
        return path

    def _remove_leftovers(self) -> None:
        """Removes temporary folders of exports to the same paths whose process has ended."""
        if self.result.parent.is_dir():
            for entry in self.result.parent.glob(f"{glob.escape(self.result.name)}.partial-*"):
                number = re.match(r"\d+", entry.name.rpartition(".partial-")[2])
                if number is None or not psutil.pid_exists(int(number[0])):
                    shutil.rmtree(entry, ignore_errors=True)
