"""Where an export goes: a new folder, or a GGUF file with its companions; whole or not at all.

A folder in the hub's layout is one model, and its files carry the names that the hub and other programs look for.  GGUF
files of several types often lie in one folder, so everything that belongs to one is named after it.
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

#: What follows the name of a GGUF file without its ending.
_BESIDE_FILE: dict[Companion, str] = {
    "card": ".md",
    "modelfile": ".Modelfile",
    "fidelity": ".fidelity.json",
    "fidelity_page": ".fidelity.md",
    "certificate": ".certificate.json",
}
#: Names in a folder that is one model.
_IN_FOLDER: dict[Companion, str] = {
    "card": "README.md",
    "modelfile": "Modelfile",
    "fidelity": "fidelity.json",
    "fidelity_page": "fidelity.md",
    "certificate": "certificate.json",
}


class Place:
    """The output of one export.

    Args:
        out: A folder, or a file whose name ends in ``.gguf``.
        stem: Name of the GGUF file inside a folder, without its ending; None when the export is a folder of files.
        companions: What is written with it.

    Attributes:
        folder: Where everything ends up.
        main: The GGUF file's name; None when the export is a folder of files.

    Raises:
        ConfigError: Something would be overwritten, or the path makes no sense.
    """

    def __init__(self, out: Path, stem: str | None, companions: Collection[Companion] = tuple(_BESIDE_FILE)) -> None:
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
        """What was asked for: the GGUF file, or the folder."""
        return self.folder if self.main is None else self.folder / self.main

    def name(self, companion: Companion) -> str:
        """The file name of a companion."""
        if self.main is None:
            return _IN_FOLDER[companion]
        return Path(self.main).stem + _BESIDE_FILE[companion]

    def path(self, companion: Companion) -> Path:
        """Where a companion lies in the end."""
        return self.folder / self.name(companion)

    def files(self) -> dict[str, str]:
        """The paths of what was written, by what it is."""
        found = {kind: self.path(kind) for kind in _BESIDE_FILE}
        return {"model": str(self.result)} | {kind: str(path) for kind, path in found.items() if path.is_file()}

    def require_bytes(self, needed: int) -> None:
        """Raises when the disk is too small for what will be written.

        Raises:
            DoesNotFit: It is.
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
        """Yields a folder to fill; when the block ends well everything in it moves to its place, the main file last.

        However the block ends, nothing half-written is left, nor a folder that was made for it.
        """
        self._clear()
        folder = self.folder.absolute()
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        whole = self.folder if self.main is None else self._staging("whole")

        def clean() -> None:
            if self.main is not None:
                shutil.rmtree(whole, ignore_errors=True)
            for path in made:
                with suppress(OSError):  # somebody else's files are in it
                    path.rmdir()

        try:
            with on_forced_exit(clean):
                with atomic_folder(whole) as partial:
                    yield partial
                    self._require_free()  # somebody may have written there meanwhile
                if self.main is not None:
                    self._move(whole)
        except BaseException:
            clean()
            raise

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yields a temporary folder on the same disk; if we are killed, the next export to this place clears it."""
        staging = self._staging("scratch")
        with scratch_folder(staging.parent, f"{staging.name}-") as folder:
            yield folder

    def _staging(self, purpose: str) -> Path:
        return self.result.with_name(f"{self.result.name}.partial-{os.getpid()}-{purpose}")

    def _move(self, staging: Path) -> None:
        """Moves what was written to its place; takes it back if that is interrupted."""
        moved = []
        try:
            with renaming:
                for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == self.main):
                    os.replace(entry, self.folder / entry.name)
                    moved.append(self.folder / entry.name)
            sync(self.folder)
        except BaseException:
            for path in moved:
                path.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _require_free(self) -> None:
        taken = self._taken()
        if taken is not None:
            raise ConfigError(
                f"{taken} exists; nothing is overwritten.",
                where=f"--out {self._out}",
                fix=f"delete it, or use --out {self._another()}",
            )

    def _taken(self) -> Path | None:
        """Something in the way, if there is anything."""
        if self.main is not None and (self.folder.is_dir() or not self.folder.exists()):
            names = (self.result, *map(self.path, self._companions))
            return next((path for path in names if path.exists()), None)
        free = not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))
        return None if free else self.folder

    def _another(self) -> Path:
        """A path like ``--out`` where nothing is yet."""
        taken = self.result if self.folder.is_dir() or not self.folder.exists() else self.folder
        number = 2
        while (path := taken.with_name(f"{taken.stem}-{number}{taken.suffix}")).exists():
            number += 1
        return path

    def _clear(self) -> None:
        """Removes what a killed export to the same place left behind."""
        if self.result.parent.is_dir():
            for entry in self.result.parent.glob(f"{glob.escape(self.result.name)}.partial-*"):
                number = re.match(r"\d+", entry.name.rpartition(".partial-")[2])
                if number is None or not psutil.pid_exists(int(number[0])):
                    shutil.rmtree(entry, ignore_errors=True)
