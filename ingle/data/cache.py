"""The cache of tokenized data on disk: which file belongs to which rows.

A shard is named after a digest of everything that decides its content: the rows, the tokenizer with its chat template,
the options, and the code. Nothing is ever out of date, and an edited row changes one name. Files are complete or do not
exist, so any number of processes may use the cache at once; a lock only saves them from tokenizing the same data twice.

An index remembers the shards of files that have not changed since (size, time of modification, inode), so that opening
a known dataset reads none of its rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ingle import env
from ingle.atomic import write_atomically
from ingle.config.data import DataConfig
from ingle.data.chunks import Chunk
from ingle.data.row_encoder import TokenOptions
from ingle.data.sources import find_files, hub_revision
from ingle.data.types import Tokenizer

#: Part of every name; change it together with the layout of a shard.
_FORMAT = 2
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets")
#: A file that changed less than this time before it was read may change again without a new time of modification.
_SETTLED_NS = 2_000_000_000
#: A file that a killed process left behind is removed after this time.
_LEFT_BEHIND_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk in an index.

    Attributes:
        source: Number of its source in ``data.sources``.
        name: Name of its shard.
        prefix: ``file:line`` of its rows without the number.
        base: Number of its first row.
        warnings: Sentences about its table.
    """

    source: int
    name: str
    prefix: str
    base: int
    warnings: tuple[str, ...] = ()


class DataCache:
    """The shards of all datasets that one tokenizer makes with the same options.

    Args:
        data: The sources.
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
        folder: The folder of the cache; by default ``data`` in :func:`ingle.env.cache_folder`.
    """

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, options: TokenOptions, folder: Path | None = None
    ) -> None:
        self._data = data
        self._settings = _digest(_settings(tokenizer, options))
        self.folder = (folder or env.cache_folder() / "data") / self._settings[:24]

    def name(self, chunk: Chunk) -> str:
        """Returns the name of the shard of a chunk."""
        source = chunk.source
        return _digest([self._settings, source.layout, source.columns, source.label, chunk.digest])[:40]

    def path(self, name: str) -> Path:
        """Returns the file of a shard."""
        return self.folder / f"{name}.safetensors"

    def memo(self, entries: Sequence[Entry]) -> Path:
        """Returns the file that keeps the fingerprint of a dataset."""
        return self.folder / f"{_digest([entry.name for entry in entries])[:40]}.sha256"

    @contextmanager
    def locked(self, on_wait: Callable[[], object]) -> Iterator[None]:
        """Waits for other processes that tokenize the same sources.

        Args:
            on_wait: Called if there is one.

        Raises:
            OSError: The folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_left_behind()
        with (self.folder / f"{_digest(self._sources)[:40]}.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: processes may do the same work twice
            yield

    def read_index(self) -> list[Entry] | None:
        """Returns the chunks of the sources if no file has changed since they were tokenized."""
        files = self._files()
        if files is None:
            return None
        try:
            content = json.loads(self._index(files).read_text(encoding="utf-8"))
            return [Entry(**(entry | {"warnings": tuple(entry["warnings"])})) for entry in content]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_index(self, entries: Sequence[Entry], began_ns: int) -> None:
        """Remembers the chunks of the sources.

        Args:
            entries: The chunks, in order.
            began_ns: Time at which the first source was opened, in nanoseconds.

        Raises:
            CheckpointError: The disk is full.
        """
        files = self._files()
        if files is None or any(modified > began_ns - _SETTLED_NS for _, _, modified, _ in files):
            return
        write_atomically(self._index(files), json.dumps([asdict(entry) for entry in entries]).encode())

    def _index(self, files: Sequence[tuple[str, int, int, int]]) -> Path:
        return self.folder / f"{_digest([self._sources, files])[:40]}.index.json"

    @cached_property
    def _sources(self) -> list[Any]:
        return [source.model_dump(mode="json") for source in self._data.sources]

    def _files(self) -> list[tuple[str, int, int, int]] | None:
        """Returns path, size, time of modification and inode of all files; a hub dataset is known by its commit.

        None if the commit is unknown.
        """
        found = []
        for source in self._data.sources:
            paths = find_files(source.path)
            if paths is None and (revision := hub_revision(source)) is None:
                return None
            if paths is None:
                found.append((f"{source.path}@{revision}", 0, 0, 0))
            for path in paths or ():
                status = path.stat()
                found.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
        return found

    def _remove_left_behind(self) -> None:
        for path in self.folder.glob("*.partial-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                    path.unlink()


def _settings(tokenizer: Tokenizer, options: TokenOptions) -> list[Any]:
    """Returns everything but the rows that decides the content of a shard."""
    backend = tokenizer.backend_tokenizer.to_str()
    template = tokenizer.chat_template
    return [
        _FORMAT,
        {name: _version(name) for name in _LIBRARIES},
        _code(),
        asdict(options),
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        hashlib.sha256(backend.encode()).hexdigest(),
        template,
        [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)],
        sorted(map(str, getattr(tokenizer, "special_tokens_map", {}).items())),
        sorted(getattr(tokenizer, "chat_control_tokens", None) or ()),
        list(getattr(tokenizer, "model_input_names", ())),
        # Translation models mark sources and targets by language; the backend has the tokens of sources only.
        [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
        # A template may write the date.
        date.today().isoformat() if "strftime_now" in str(template) else None,
    ]


def _code() -> str:
    """Returns a digest of the code of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def can_cache(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer can be identified by its content."""
    return hasattr(getattr(tokenizer, "backend_tokenizer", None), "to_str")
