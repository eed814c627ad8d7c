"""Rewards by rule: a rule scores an answer from its text, its tokens and the columns of the row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from ingle.errors import RewardError
from ingle.rewards.matching import collapse, first_number, last_number, normalize

Rule = Callable[[str, Sequence[int], Mapping[str, Any]], float | None]

#: What stands before the result of a solution of GSM8K.
_MARK = "####"
#: What marks the result of a solution in LaTeX.
_BOX = "\\boxed{"
#: verl's strict parser, which reads the last characters alone.
_VERL, _VERL_CHARS = re.compile(r"#### (\-?[0-9\.\,]+)"), 300


def make(options: Mapping[str, Any]) -> Rule:
    """Returns the rule of a section of :mod:`ingle.config.rewards`; it gives no score if its column is null.

    Raises:
        RewardError: A regular expression is invalid.
    """
    rule, column = _MAKERS[options["kind"]](options), options.get("column", "")

    def known(text: str, ids: Sequence[int], columns: Mapping[str, Any]) -> float | None:
        return None if column in columns and columns[column] is None else rule(text, ids, columns)

    return known


def _column(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise LookupError(f"the row has no column {name}")
    return columns[name]


def _texts(columns: Mapping[str, Any], name: str) -> list[str]:
    value = _column(columns, name)
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _exact_match(options: Mapping[str, Any]) -> Rule:
    spell = normalize if options["normalize"] else collapse

    def rule(text: str, ids: Sequence[int], columns: Mapping[str, Any]) -> float:
        return float(spell(text) in {spell(target) for target in _texts(columns, options["column"])})

    return rule


def _number(options: Mapping[str, Any]) -> Rule:
    read = {"last": _final_number, "gsm8k": _behind_mark, "verl": _verl_number}[options["style"]]

    def rule(text: str, ids: Sequence[int], columns: Mapping[str, Any]) -> float:
        reference = str(_column(columns, options["column"]))
        found = read(text)
        if found is None:
            return 0.0
        if isinstance(found, str):  # verl compares texts
            right = found == reference.rpartition(_MARK)[2].strip().replace(",", "")
        else:
            target = _behind_mark(reference) if _MARK in reference else last_number(reference)
            if target is None:
                raise ValueError(f"the column {options['column']} has no number")
            right = bool(abs(found - target) <= Decimal(options["tolerance"]) * abs(target))
        return 1.0 if right else float(options["format_score"])

    return rule


def _final_number(text: str) -> Decimal | None:
    return first_number(text.rpartition(_BOX)[2]) if _BOX in text else last_number(text)


def _behind_mark(text: str) -> Decimal | None:
    return first_number(text.rpartition(_MARK)[2]) if _MARK in text else None


def _verl_number(text: str) -> str | None:
    found = _VERL.findall(text[-_VERL_CHARS:])
    return found[-1].replace(",", "") if found else None


def _contains(options: Mapping[str, Any]) -> Rule:
    def rule(text: str, ids: Sequence[int], columns: Mapping[str, Any]) -> float | None:
        wanted = _texts(columns, options["column"])
        if options["ignore_case"]:
            text, wanted = text.lower(), [value.lower() for value in wanted]
        if not wanted:
            return None
        return sum((value in text) is not bool(options["absent"]) for value in wanted) / len(wanted)

    return rule


def _format(options: Mapping[str, Any]) -> Rule:
    try:
        pattern = re.compile(options["pattern"], re.DOTALL)
    except re.error as error:
        raise RewardError(
            f"The pattern {options['pattern']!r} is not a valid regular expression.",
            where=f"{options['where']}.pattern",
            why=str(error),
        ) from None
    match = pattern.fullmatch if options["full"] else pattern.search
    return lambda text, ids, columns: float(match(text) is not None)


def _length(options: Mapping[str, Any]) -> Rule:
    return lambda text, ids, columns: float(options["low"] <= len(ids) <= options["high"])


def _overlong(options: Mapping[str, Any]) -> Rule:
    free = options["max"] - options["buffer"]
    return lambda text, ids, columns: max(-1.0, min(0.0, (free - len(ids)) / options["buffer"]))


def _repetition(options: Mapping[str, Any]) -> Rule:
    size = options["ngram"]

    def rule(text: str, ids: Sequence[int], columns: Mapping[str, Any]) -> float:
        ngrams = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
        return (len(set(ngrams)) / len(ngrams) - 1) * float(options["max_penalty"]) if ngrams else 0.0

    return rule


_MAKERS: Mapping[str, Callable[[Mapping[str, Any]], Rule]] = {
    "exact_match": _exact_match,
    "number": _number,
    "contains": _contains,
    "format": _format,
    "length": _length,
    "overlong": _overlong,
    "repetition": _repetition,
}
