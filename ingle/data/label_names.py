"""Names of classes and tags: found in the training data, written into the config, and turned into numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ingle.config.data import DataConfig
from ingle.config.objective import SCHEMES, Answer, Classify, ObjectiveConfig, Tag, outside_scheme
from ingle.data.dataset import TokenDataset
from ingle.data.row_encoder import TokenOptions
from ingle.data.sources import read_examples
from ingle.data.types import IGNORE_INDEX, Example, Label, Span
from ingle.errors import DataError
from ingle.wording import either, nearest, plural, some

#: More numbers than this are no classes.
_MAX_NUMBERS = 50
#: More names than this are no classes, but texts in the wrong column.
_MAX_NAMES = 10_000
#: The most frequent class may have this many times the rows of the rarest, which has at least this share of all rows.
_UNBALANCED, _RARE = 20, 0.01
#: Names that a message lists.
_LISTED = 12

_NAME_IT = "name its column with data.sources: columns: {label: ...}, or set label: for the files of one class"
_OUTSIDE = "O"


def name_labels(data: DataConfig, objective: ObjectiveConfig) -> ObjectiveConfig:
    """Returns the objective with the names of its labels; reads all rows if the config does not have them.

    Classes are sorted, numbers by value; ``O`` is the first tag, and tags are sorted by type. For questions, the rows
    decide whether there may be no answer. An objective without labels is returned as it is.

    Raises:
        DataError: A row has no label, or there are fewer than two classes.
    """
    match objective:
        case Classify(problem="auto") | Classify(labels=None, problem="single" | "multi"):
            return _name_classes(data, objective)
        case Tag(labels=None):
            return objective.model_copy(update={"labels": _find_tags(data, objective.scheme)})
        case Answer(no_answer="auto"):
            rows = read_examples(data.sources, objective="answer")
            return objective.model_copy(
                # All rows are read: a reader that is left half-way leaves its file open.
                update={"no_answer": "allow" if sum(row.label == () for row in rows) else "forbid"}
            )
    return objective


def _find_tags(data: DataConfig, scheme: str) -> tuple[str, ...]:
    found = Counter[str]()
    for example in read_examples(data.sources, objective="tag"):
        tags = _as_names(_require(example))
        for tag in set(tags) - found.keys():
            if outside_scheme(tag, scheme):
                raise DataError(
                    f"The tag {tag[:60]!r} is not in the scheme {scheme}.",
                    where=example.origin,
                    why=f"its tags begin with {either([f'{prefix}-' for prefix in SCHEMES[scheme]])}, or are O",
                    fix="correct the row, or use --objective.scheme=auto",
                )
        found.update(tags)
    _require_two(found, data)
    return tuple(sorted(found, key=_tag_order))


def _name_classes(data: DataConfig, objective: Classify) -> Classify:
    found, lists = Counter[str](), False
    for example in read_examples(data.sources, objective="classify"):
        label = _require(example)
        lists |= isinstance(label, tuple)
        found.update(_as_names(label))
        if len(found) > _MAX_NAMES and not _are_numbers(found):
            raise DataError(
                "There are too many classes.",
                where=example.origin,
                why=f"{len(found):,} different labels, for example {some(found)}",
                fix=_NAME_IT,
            )
    problem = objective.problem
    if problem == "auto":
        problem = "multi" if lists else "regression" if not objective.labels and _measure(found) else "single"
    if problem == "regression":
        return objective.model_copy(update={"problem": problem, "labels": None})
    _require_two(found, data)
    names = objective.labels or tuple(sorted(found, key=_natural))
    return objective.model_copy(update={"problem": problem, "labels": names})


def _require(example: Example) -> Label:
    if example.label is None:
        raise DataError("The row has no label.", where=example.origin, fix=_NAME_IT)
    return example.label


def _as_names(label: Label) -> tuple[str, ...]:
    names = (label,) if isinstance(label, str) else label
    assert not any(isinstance(name, Span) for name in names), "answers have no names"
    return tuple(map(str, names))


def _require_two(found: Counter[str], data: DataConfig) -> None:
    if len(found) < 2:
        only = f"every label is {next(iter(found))!r}" if found else "no row has a label"
        raise DataError(
            "The training data has fewer than two classes.",
            where="data.sources: " + ", ".join(source.path for source in data.sources),
            why=only,
            fix="add rows of another class, or name another column: columns: {label: ...}",
        )


def _are_numbers(found: Counter[str]) -> bool:
    return all(map(_is_number, found))


def _is_number(name: str) -> bool:
    try:
        return bool(np.isfinite(float(name)))
    except ValueError:
        return False


def _measure(found: Counter[str]) -> bool:
    """Returns whether labels are measurements and no classes: fractions, or many numbers."""
    fractions = any(not float(name).is_integer() for name in found) if _are_numbers(found) else False
    return fractions or (_are_numbers(found) and len(found) > _MAX_NUMBERS)


def _natural(name: str) -> tuple[object, ...]:
    if _is_number(name):
        return (0, float(name), name)
    return (1, *((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part))


def _tag_order(tag: str) -> tuple[object, ...]:
    prefix, _, kind = tag.partition("-")
    return (tag != _OUTSIDE, kind or prefix, "BSIELU".find(prefix) if kind else -1, tag)


def describe_classes(dataset: TokenDataset, names: Sequence[str]) -> list[str]:
    """Returns what a user should know about the classes of a dataset and their frequencies, in sentences.

    Args:
        dataset: Documents with ``document_labels``.
        names: The names of the classes.
    """
    counts = dataset.label_counts(len(names)).tolist()
    if not sum(counts):
        return []
    found = []
    if missing := [name for name, count in zip(names, counts, strict=True) if not count]:
        found.append(f"No row has the label {either([repr(name) for name in missing[:_LISTED]])}.")
    if odd := [index for index in _find_odd(names) if counts[index]]:
        listed = ", ".join(_locate_rows(dataset, names, index, counts[index]) for index in odd[:_LISTED])
        found.append(f"Some labels are numbers and others are names: {listed}.")
    present = [(count, name) for name, count in zip(names, counts, strict=True) if count]
    (least, rare), (most, common) = min(present), max(present)
    if least == 1:
        found.append(f"Only one row has the label {rare!r}, so nothing shows whether the model recognizes it.")
    if most > _UNBALANCED * least or least < _RARE * sum(counts):
        ratio = f"{plural(most, 'row')} of {common!r}, {least:,} of {rare!r}"
        found.append(f"The classes are unbalanced: {ratio} (objective.class_weights=balanced weights them alike).")
    return found


def _find_odd(names: Sequence[str]) -> list[int]:
    """Returns the places of numbers among names, or of names among numbers, whichever are fewer."""
    numbers = [index for index, name in enumerate(names) if _is_number(name)]
    others = [index for index, name in enumerate(names) if not _is_number(name)]
    return min(numbers, others, key=len)


def _locate_rows(dataset: TokenDataset, names: Sequence[str], index: int, count: int) -> str:
    labels = dataset.document_column("document_labels")
    first = int(np.argmax(labels[:, index] == 1 if labels.ndim == 2 else labels == index))
    return f"{names[index]!r} in {plural(count, 'row')} (first {dataset.origin(first)})"


def spellings(names: Sequence[str]) -> Mapping[str, str]:
    """Returns the class or tag that each label of a row means, by how it is written.

    Data may count its classes from 0 and leave their names to the config, unless a name is itself a number.
    """
    numbers = {} if any(map(str.isdecimal, names)) else {str(i): name for i, name in enumerate(names)}
    return numbers | {name: name for name in names}


class LabelEncoder:
    """Turns labels into numbers.

    Args:
        options: The names of the labels, and how they are read.
    """

    def __init__(self, options: TokenOptions) -> None:
        self._options = options
        index_of = {name: i for i, name in enumerate(options.labels)}
        self._index = {written: index_of[name] for written, name in spellings(options.labels).items()}

    def encode(self, example: Example) -> npt.NDArray[np.float32]:
        """Returns the label of a row: the index of its class, its number, or [C] with 1 for each of its classes.

        A label that is unknown, in rows to predict, is ``IGNORE_INDEX``.

        Raises:
            DataError: The row has no label, or one that is no class or no number.
        """
        multi = self._options.problem == "multi"
        if example.label is None and not self._options.with_labels:
            return np.full((len(self._options.labels),) if multi else (), IGNORE_INDEX, np.float32)
        names = _as_names(_require(example))
        if multi:
            chosen = np.zeros(len(self._options.labels), np.float32)
            chosen[[self.find(name, example.origin) for name in names]] = 1
            return chosen
        if len(names) != 1 or not isinstance(example.label, str):
            raise DataError(
                "The row has a list of labels, but the problem has one label per row.",
                where=example.origin,
                fix="--objective.problem=multi",
            )
        if self._options.problem == "single":
            return np.array(self.find(names[0], example.origin), np.float32)
        if not _is_number(names[0]):
            raise DataError("The label is not a number.", where=example.origin, why=f"it is {names[0]!r}")
        return np.array(float(names[0]), np.float32)

    def find(self, name: str, origin: str) -> int:
        """Returns the index of a class or tag, see :func:`spellings`.

        Raises:
            DataError: There is no such class.
        """
        found = self._index.get(name)
        if found is not None:
            return found
        names = self._options.labels
        near = nearest(name, names)
        listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
        raise DataError(
            f"The label {name[:60]!r} is unknown.",
            where=origin,
            why=f"the only label is {listed}" if len(names) == 1 else f"the {len(names):,} labels are {listed}",
            fix=f"did you mean {near!r}?" if near else "correct the row, or add the name to objective.labels",
        )
