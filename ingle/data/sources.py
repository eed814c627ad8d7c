"""Reads the examples of data sources: finds their files or hub datasets, and reads the rows in order.

The first row of a file decides its layout; a later row that does not fit is an error with its line.
"""

from __future__ import annotations

import difflib
import glob
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ingle import env
from ingle.config.data import Layout, Source
from ingle.config.objective import FAMILY, ObjectiveKind
from ingle.data.corpus_readers import read_file
from ingle.data.labelled_rows import LABELS, TAGS
from ingle.data.layout_detection import detect_source, rename_columns
from ingle.data.layouts import parse_row
from ingle.data.readers import Rows, data_suffix, known_suffixes
from ingle.data.types import Example, RowParser
from ingle.errors import DataError, DependencyError, HubUnavailable
from ingle.wording import either, first_line, some

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

#: The hub counts as unreachable if it does not answer within this time.
_HUB_TIMEOUT_S = 10

_LOCAL = "download it elsewhere and name the file: data.sources=[{path: train.jsonl}] (or .csv, .parquet, .txt)"


def read_examples(
    sources: Sequence[Source],
    *,
    objective: ObjectiveKind = "sft",
    parse: RowParser | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Iterator[Example]:
    """Yields the examples of all sources, in order.

    Args:
        sources: Files, globs, folders or hub datasets.
        objective: Decides, next to the columns, how rows are read.
        parse: Reads rows; by default they are read in the layout of their source.
        on_warning: Called with a sentence if a file fits several layouts.

    Raises:
        DataError: A source is missing or empty, or a row is malformed; names ``file:line``.
        HubUnavailable: The hub cannot be reached for a hub dataset.
    """
    for source in sources:
        if parse is None:
            _require_suited(source, objective)
        examples = (
            example
            for table in open_tables(source)
            for example in read_table(
                table.rows, table.name, source, objective=objective, parse=parse, on_warning=on_warning
            )
        )
        yield from islice(examples, source.limit)


def sample_examples(sources: Sequence[Source], step: int, objective: ObjectiveKind = "sft") -> Iterator[Example]:
    """Yields every ``step``-th example of all sources, from the first on; the other rows are not examined.

    Raises:
        DataError: As :func:`read_examples`.
        HubUnavailable: The hub cannot be reached for a hub dataset.
    """
    number = 0
    for source in sources:
        left = source.limit
        for table in open_tables(source):
            rows, fixed, first, _ = choose_table_layout(table, source, objective)
            for place, row in islice(rows, left):
                if number % step == 0:
                    yield from read_table(iter([(place, row)]), table.name, fixed, first=first)
                number += 1
                left = None if left is None else left - 1
            if left == 0:
                break


class Table(NamedTuple):
    """A file or a split of a hub dataset: its name, its rows with their places, and the file if its suffix decides."""

    name: str
    rows: Rows
    path: Path | None = None


def open_tables(source: Source) -> Iterator[Table]:
    """Yields the tables of a source, in order; nothing is read before their rows are.

    Raises:
        DataError: Nothing matches the path.
    """
    paths = find_files(source.path)
    if paths is None:
        yield Table(f"{source.path}[{source.split}]", _read_hub(source))
        return
    for path in paths:
        # Without its path, a table is read through its rows.
        yield Table(str(path), read_file(path, source), None if source.lines or source.layout == "conll" else path)


def read_table(
    rows: Rows,
    name: str,
    source: Source,
    *,
    first: str = "",
    objective: ObjectiveKind = "sft",
    parse: RowParser | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Iterator[Example]:
    """Yields the examples of consecutive rows of a table.

    Args:
        rows: The rows with their places.
        name: The file or dataset, which ``file:line`` begins with.
        source: Layout and columns.
        first: ``file:line`` of the first row of the table; by default the first of ``rows``.
        objective: Decides, next to the columns, on the layout of a source that names none.
        parse: Reads rows; by default they are read in the layout of the source.
        on_warning: Called with a sentence if the rows fit several layouts.

    Raises:
        DataError: A row is malformed; names ``file:line``.
    """
    for place, raw in rows:
        origin = f"{name}:{place}"
        if parse is None and source.layout == "auto":
            source, warning = detect_source(raw, source, objective, name, origin)
            if warning is not None and on_warning is not None:
                on_warning(warning)
        row = rename_columns(raw, source.columns, origin) if source.columns else raw
        if source.label is not None:
            row = {**row, "label": source.label}
        first = first or origin
        yield parse_row(row, source.layout, origin, first) if parse is None else parse(row, origin)


def _require_suited(source: Source, objective: ObjectiveKind) -> None:
    """Refuses a given layout that does not suit the objective: preferences, judgements, prompts, or neither.

    Raises:
        DataError: The layout does not suit.
    """
    pairs: tuple[Layout, ...] = ("preference", "transcript", "ranked")
    suits = {"pairs": pairs, "reward": pairs, "judged": (*pairs, "judged"), "prompts": ("prompts",)}
    suited: tuple[Layout, ...] = suits.get(FAMILY[objective], ())
    layout: Layout = source.layout
    if layout == "auto" or layout in suited or (not suited and layout not in (*pairs, "judged", "prompts")):
        return
    others = {"judged": "kto or bco", "prompts": "grpo or ppo"}.get(layout, "dpo or reward")
    fix = f"objective.kind: {others}" if not suited else f"data.sources: layout: {either(list(suited))}"
    raise DataError(f"The layout {layout} does not suit the objective {objective}.", where=source.path, fix=fix)


def choose_table_layout(
    table: Table, source: Source, objective: ObjectiveKind = "sft"
) -> tuple[Rows, Source, str, str | None]:
    """Chooses the layout of a table by its first row.

    Returns:
        All rows, the source with a layout that is never ``auto``, ``file:line`` of the first row, and a warning if
        other layouts fit.

    Raises:
        DataError: No layout fits, or the first row cannot be read.
    """
    place, row = next(table.rows)
    first = f"{table.name}:{place}"
    warning = None
    _require_suited(source, objective)
    if source.layout == "auto":
        source, warning = detect_source(row, source, objective, table.name, first)
    return chain([(place, row)], table.rows), source, first, warning


def find_files(path: str) -> list[Path] | None:
    """Returns the files that a path names, sorted; None if it can only be a hub dataset.

    Raises:
        DataError: Nothing matches.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = sorted(p for p in local.iterdir() if p.is_file() and data_suffix(p) in known_suffixes())
        if not found:
            raise DataError(
                "The folder contains no data file.", where=path, fix=f"use one of {', '.join(known_suffixes())}"
            )
        return found
    if local.is_file():
        return [local]
    if local.exists():
        raise DataError("The data source is not a regular file.", where=path, fix="save its content in a file")
    if glob.has_magic(path):
        found = sorted(p for p in map(Path, glob.glob(str(local), recursive=True)) if p.is_file())
        if not found:
            raise DataError("No file matches the pattern.", where=path)
        return found
    if _HUB_ID.fullmatch(path) and data_suffix(local) not in known_suffixes():
        return None
    raise DataError("The data file does not exist.", where=path, fix=_suggest(local))


def _suggest(missing: Path) -> str:
    """Suggests the most similar name that exists, or the data files of the folder."""
    folder = next(folder for folder in missing.parents if folder.is_dir() or folder == folder.parent)
    part = missing.relative_to(folder).parts[0] if folder != missing.parent else missing.name
    names = _names_in(folder)
    near = difflib.get_close_matches(part, names, n=1, cutoff=0.75)
    if near:
        return f"did you mean {folder / near[0]}?"
    data = [name for name in names if data_suffix(Path(name)) in known_suffixes()]
    return f"{folder}/ contains {some(data)}" if data else f"check the path; {folder.resolve()} contains no data file"


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError:
        return []


def _read_hub(source: Source) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            "Hub datasets need the library `datasets`.", where=source.path, fix="pip install datasets"
        ) from error
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    size = 0
    if not env.hub_offline() and not (folder / source.path.replace("/", "___")).exists():
        size = _ask_hub(source)
    options = {"streaming": True} if size > _free_bytes(folder) // 2 else {}
    number = 0
    try:
        found = datasets.load_dataset(source.path, source.name, split=source.split, **options)
        names = _class_names(getattr(found, "features", None))
        for number, row in enumerate(found, 1):
            yield number, name_classes(row, names)
    except Exception as error:  # the library raises errors of many kinds, also those of its dependencies
        raise _hub_error(source, error) from error
    if number == 0:
        raise DataError("The dataset has no rows.", where=f"{source.path}[{source.split}]")


def _class_names(features: Mapping[str, Any] | None) -> dict[str, Sequence[str]]:
    """Returns the names of the classes that columns with labels or tags contain as numbers."""
    found = {}
    for column in (*LABELS, *TAGS):
        feature = (features or {}).get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            found[column] = names
    return found


def name_classes(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns a row of a hub dataset with the names of its classes; -1 is an unknown class."""

    def name(value: Any, column: str) -> Any:
        if isinstance(value, list):
            return [name(item, column) for item in value]
        return (names[column][value] if value >= 0 else None) if isinstance(value, int) else value

    return {key: name(value, key) if key in names else value for key, value in row.items()}


def _free_bytes(folder: Path) -> int:
    """Returns the free bytes of the disk on which a folder is, or will be."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())).free


def hub_revision(source: Source) -> str | None:
    """Returns the commit of a hub dataset; None if the hub cannot be asked."""
    from huggingface_hub import HfApi

    if env.hub_offline():
        return None
    try:
        info = HfApi().dataset_info(source.path, timeout=_HUB_TIMEOUT_S)
    except Exception:  # reading the dataset raises the error
        return None
    return getattr(info, "sha", None)


def _ask_hub(source: Source) -> int:
    """Returns the bytes of all files of a hub dataset; 0 if the hub does not say.

    Raises ``HubUnavailable`` if the hub cannot be reached, without the many retries of ``load_dataset``.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().dataset_info(source.path, timeout=_HUB_TIMEOUT_S, files_metadata=True)
    except (HfHubHTTPError, HFValidationError):
        return 0  # it answered; loading raises the error
    except Exception as error:  # of the HTTP library that the hub's library uses
        raise _unreachable(source, f"{type(error).__name__}: {first_line(error)}") from error
    return sum(file.size or 0 for file in getattr(info, "siblings", None) or ())


def _hub_error(source: Source, error: Exception) -> DataError | HubUnavailable:
    """Returns the error for an unreachable hub, or for a dataset that it does not have."""
    why = f"{type(error).__name__}: {first_line(error)}"
    missing = isinstance(error, FileNotFoundError)  # the base of the library's "not found" errors
    if env.hub_offline() or "Connect" in type(error).__name__ or (isinstance(error, OSError) and not missing):
        return _unreachable(source, why)
    where = f"data.sources: {source.path}"
    return DataError("The hub dataset cannot be loaded.", where=where, why=why, fix=_LOCAL)


def _unreachable(source: Source, why: str) -> HubUnavailable:
    return HubUnavailable(
        f"There is no local file {source.path!r}, and the hub cannot be reached for a dataset of that name.",
        where=f"data.sources: {source.path}",
        why=why,
        fix=_LOCAL,
    )
