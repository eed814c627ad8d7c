"""Where an export goes: a new folder, or a file with its companions beside it; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ingle.atomic import atomic_folder, sync
from ingle.errors import ConfigError, DoesNotFit
from ingle.stopping import renaming, undone
from ingle.wording import size

#: What may lie beside an exported file.
COMPANIONS = ("README.md", "Modelfile", "fidelity.json", "fidelity.md", "certificate.json")


class Place:
    """The output of one export.

    Args:
        out: A folder, or a file whose name ends in ``.gguf``.
        stem: Name of the GGUF file inside a folder, without its ending; None when the export is a folder of files.
        companions: What is written beside a file.

    Attributes:
        folder: Where everything ends up.
        main: The GGUF file's name; None when the export is a folder of files.

    Raises:
        ConfigError: When something is there that would be overwritten, or the path makes no sense.
    """

    def __init__(self, out: Path, stem: str | None, companions: Sequence[str] = COMPANIONS) -> None:
        self._companions = companions
        self._is_file = out.suffix == ".gguf"
        if self._is_file and stem is None:
            raise ConfigError("this export is a folder, not a .gguf file.", where=f"--out {out}", fix="name a folder")
        self.folder = out.parent if self._is_file else out
        self.main = out.name if self._is_file else (None if stem is None else f"{stem}.gguf")
        self._out = out
        taken = self._taken()
        if taken:
            raise ConfigError(
                f"{taken} exists; an export overwrites nothing.",
                where=f"--out {out}",
                fix=f"delete it, or name another: --out {_another(out)}",
            )

    @property
    def result(self) -> Path:
        """What was asked for: the GGUF file, or the folder."""
        return self.folder if self.main is None else self.folder / self.main

    def require_bytes(self, needed: int) -> None:
        """Raises when the disk is too small for what will be written.

        Raises:
            DoesNotFit: It is.
        """
        there = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        needed += 16 << 20
        if needed > free:
            raise DoesNotFit(
                f"this export needs {size(needed)} of disk; {size(free)} are free.",
                where=f"--out {self._out}",
                fix="free some space, name a folder on another disk, or choose a smaller --type",
            )

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Yields a folder to fill; when the block ends well everything in it moves to its place, the main file last."""
        self._clear()
        if not self._is_file:
            with atomic_folder(self._out) as partial:
                yield partial
            return
        staging = self._out.with_name(f"{self._out.name}.partial-{os.getpid()}-whole")
        try:
            with undone(lambda: shutil.rmtree(staging, ignore_errors=True)):
                with atomic_folder(staging) as partial:
                    yield partial
                with renaming:
                    for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == self.main):
                        os.replace(entry, self.folder / entry.name)
            sync(self.folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _taken(self) -> Path | None:
        """Something in the way, if there is anything."""
        if self._is_file:
            names = (self._out, *(self.folder / name for name in self._companions))
            return next((path for path in names if path.exists()), None)
        empty = not self._out.exists() or (self._out.is_dir() and not any(self._out.iterdir()))
        return None if empty else self._out

    def _clear(self) -> None:
        """Removes what a killed export to the same place left behind."""
        if self._out.parent.is_dir():
            for entry in self._out.parent.glob(f"{self._out.name}.partial-*"):
                shutil.rmtree(entry, ignore_errors=True)


def _another(out: Path) -> Path:
    """A path like ``out`` where nothing is yet."""
    if out.suffix == ".gguf":
        return out.parent / out.stem / out.name
    number = 2
    while (path := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    return path
