"""Chooses the layout of a table by its first row and the objective; renames columns first.

Rows are read by :mod:`ingle.data.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.config.data import Layout, Source
from ingle.config.objective import FAMILY, ObjectiveKind, reads_answers
from ingle.data.labelled_rows import detect_labelled, find_text
from ingle.data.layouts import find_pair, list_columns, refuse_media
from ingle.data.messages import is_conversation
from ingle.data.preference_rows import detect_preference
from ingle.data.prompt_rows import has_prompt
from ingle.errors import DataError

_MISSING = object()

_LABELLED: tuple[ObjectiveKind, ...] = ("answer", "tag", "classify", "seq2seq")
#: How to name the columns of objectives with labels.
_COLUMNS = {
    "classify": "{text: ..., label: ...}, or {text: ..., text_pair: ..., label: ...}",
    "tag": "{tokens: ..., tags: ...}",
    "answer": "{question: ..., context: ..., answers: ...}",
}


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    """Returns the row with its columns renamed by ``{name in a layout: name in the file}``.

    Raises:
        DataError: The file has no such column.
    """
    renamed = dict(row)
    for name, own in columns.items():
        found = row.get(own, _MISSING)
        if found is _MISSING and "." in own:
            found = _find_nested(row, own)
        if found is _MISSING:
            raise DataError(
                f"There is no column {own!r}.",
                where=origin,
                why=f"the columns are {list_columns(row)}",
                fix="correct `columns:` in data.sources, which maps Ingle's names to those in the file",
            )
        renamed[name] = found
        if own not in columns:
            renamed.pop(own, None)
    return renamed


def _find_nested(row: Mapping[str, Any], path: str) -> Any:
    """Returns the value of a nested column such as ``translation.en`` or ``messages.0.content``."""
    value: Any = row
    for key in path.split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            return _MISSING
    return value


def detect_layout(row: Mapping[str, Any], origin: str) -> tuple[Layout, tuple[Layout, ...]]:
    """Returns the layout that fits the columns of a row best, and the others that fit.

    Raises:
        DataError: No layout fits.
    """
    row = {key: value for key, value in row.items() if value is not None}
    fits: list[Layout] = []
    if is_conversation(row.get("messages")) or is_conversation(row.get("conversations")):
        fits.append("messages")
    if is_conversation(row.get("conversations"), "from") or is_conversation(row.get("messages"), "from"):
        fits.append("sharegpt")
    if "instruction" in row and any(name in row for name in ("output", "response", "references")):
        fits.append("instruction")
    elif find_pair(row) is not None:
        fits.append("prompt-completion")
    if "text" in row:
        fits.append("text")
    if "chosen" in row and "rejected" in row and fits in ([], ["messages"]):
        raise _refuse_preferences(row, origin)
    if not fits:
        rename = "rename them with data.sources: columns: {prompt: ..., completion: ...} or {text: ...}"
        others = " or ".join(f"--objective.kind={name}" for name in _complete_objectives(row))
        raise DataError(
            "The columns fit no known layout.",
            where=origin,
            why=_explain_columns(row),
            fix=f"{others}, which the columns fit; or {rename}" if others else rename,
        )
    return fits[0], tuple(fits[1:])


def detect_source(
    raw: Mapping[str, Any], source: Source, objective: ObjectiveKind, name: str, origin: str
) -> tuple[Source, str | None]:
    """Decides on the layout of a table by its first row.

    Args:
        raw: The row as in the file.
        source: With the layout ``auto``.
        objective: Rows of objectives with labels are read by other columns.
        name: The file or dataset.
        origin: ``file:line`` of the row.

    Returns:
        The source with its layout and all columns to rename, and a warning if other layouts fit.

    Raises:
        DataError: No layout fits, or the row is not only text.
    """
    row = rename_columns(raw, source.columns, origin) if source.columns else raw
    if FAMILY[objective] == "prompts":
        return source.model_copy(update={"layout": _detect_prompts(row, objective, origin)}), None
    if reads_answers(objective):
        labelled = row if source.label is None else {**row, "label": source.label}
        return source.model_copy(update={"layout": _detect_answers(labelled, objective, origin)}), None
    found = detect_labelled(row, objective, has_label=source.label is not None)
    if found is None and objective in ("mlm", "span") and "text" not in row:
        text = find_text(row)
        found = ("text", {"text": text}) if text else None
    if found is not None:
        layout, roles = found
        own = {role: source.columns.get(column, column) for role, column in roles.items()}
        used = {*roles.values()}
        others = {role: column for role, column in source.columns.items() if role not in used}
        columns = others | {role: column for role, column in own.items() if role != column}
        return source.model_copy(update={"layout": layout, "columns": columns}), None
    if objective in _COLUMNS:
        refuse_media(row, "labelled", origin)
        raise DataError(
            f"The columns do not fit the objective {objective}.",
            where=origin,
            why=f"the columns are {list_columns(row)}",
            fix=f"rename them with data.sources: columns: {_COLUMNS[objective]}",
        )
    layout, alternatives = detect_layout(row, origin)
    fixed = source.model_copy(update={"layout": layout})
    if not alternatives:
        return fixed, None
    return fixed, f"{name} is read as {layout}; it could also be read as {', '.join(alternatives)} (set layout:)."


def _detect_answers(row: Mapping[str, Any], objective: ObjectiveKind, origin: str) -> Layout:
    """Returns the layout of a row with preferences or judgements.

    Raises:
        DataError: It has none.
    """
    if (layout := detect_preference(row, objective)) is not None:
        return layout
    judged = "{prompt: ..., completion: ..., label: ...}"
    pairs = "{prompt: ..., chosen: ..., rejected: ...} or {prompt: ..., completions: ..., scores: ...}"
    fix = f"rename them with data.sources: columns: {pairs}"
    if FAMILY[objective] == "judged":
        fix += f" or {judged}"
    elif detect_preference(row, "kto") is not None:
        fix = "--objective.kind=kto, which learns from single answers that are good or bad"
    raise DataError(
        f"The columns do not fit the objective {objective}.",
        where=origin,
        why=f"the columns are {list_columns(row)}",
        fix=fix,
    )


def _detect_prompts(row: Mapping[str, Any], objective: ObjectiveKind, origin: str) -> Layout:
    if has_prompt(row):
        return "prompts"
    raise DataError(
        f"The columns have no prompt, which the objective {objective} needs.",
        where=origin,
        why=f"the columns are {list_columns(row)}",
        fix="rename one with data.sources: columns: {prompt: ...}",
    )


def guess_objective(row: Mapping[str, Any], origin: str) -> ObjectiveKind:
    """Returns an objective for which a row could be meant; that of chats and texts if it fits one and has no label.

    Raises:
        DataError: No layout of any objective fits.
    """
    preference = detect_preference(row, "kto")
    if preference == "judged" and isinstance(row.get("label"), bool):
        return "kto"
    if preference in ("preference", "transcript", "ranked"):
        return "dpo"
    fits = _complete_objectives(row)
    try:
        layout, _ = detect_layout(row, origin)
    except DataError:
        if fits:
            return fits[0]
        if has_prompt(row):
            return "grpo"
        raise
    return "classify" if layout == "text" and "classify" in fits else "sft"


def _complete_objectives(row: Mapping[str, Any]) -> list[ObjectiveKind]:
    """Returns the objectives for which a row has everything, its label too."""
    complete = {"classify": "label", "tag": "tags", "answer": "answers", "seq2seq": "target"}
    found = ((objective, detect_labelled(row, objective)) for objective in _LABELLED)
    return [objective for objective, fit in found if fit is not None and complete[objective] in fit[1]]


def _refuse_preferences(row: Mapping[str, Any], origin: str) -> DataError:
    name = origin.rpartition(":")[0]
    if is_conversation(row["chosen"]) and not is_conversation(row.get("prompt")):
        fix = "columns: {messages: chosen}"
    else:
        prompt = next((name for name in ("prompt", "question", "instruction", "input") if name in row), None)
        fix = f"columns: {{prompt: {prompt}, completion: chosen}}" if prompt else "columns: {text: chosen}"
    return DataError(
        "This looks like preference data: every row has a chosen and a rejected answer.",
        where=origin,
        why="sft learns from one answer per row",
        fix=f"--objective.kind=dpo; to train on the chosen answers only: data.sources=[{{path: {name}, {fix}}}]",
    )


def _explain_columns(row: Mapping[str, Any]) -> str:
    why = f"the columns are {list_columns(row)}"
    for name in ("messages", "conversations"):
        if name in row:
            why += f'; {name} must be a list such as [{{"role": "user", "content": "..."}}, ...], with a message in it'
    if len(row) == 1 and (separators := [mark for mark in (";", "\t", "|") if mark in str(next(iter(row)))]):
        why += f"; fields must be separated by commas (.csv) or tabs (.tsv), not by {separators[0]!r}"
    return why
