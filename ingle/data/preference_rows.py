"""Rows of preferences and judgements: several answers to one prompt, each with a score.

- ``preference``: ``prompt`` (optional), ``chosen`` and ``rejected``
- ``transcript``: ``chosen`` and ``rejected`` are texts with the turns ``Human:`` and ``Assistant:``
- ``judged``: ``prompt`` and ``completion``, or ``messages``, with a ``label``: good or bad
- ``ranked``: ``prompt``, ``completions`` and their ``scores``

Every answer becomes a text of its row: a whole conversation, or a prompt with its completion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from ingle.config.data import Layout
from ingle.config.objective import FAMILY, ObjectiveKind
from ingle.data.messages import is_conversation, read_messages, read_tools
from ingle.data.types import Example, Message

#: Names of columns, in order of preference.
_PROMPTS = ("prompt", "instruction", "question", "query", "input")
_COMPLETIONS = ("completion", "response", "output", "answer")
_LISTS = ("completions", "responses", "answers")
_SCORES = ("scores", "ratings")
_LABELS = ("label", "labels", "rating", "feedback")
_CONVERSATIONS = ("messages", "conversations")
_PAIR_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
#: Names of an answer's text and score inside of a list.
_TEXTS = ("text", "response", "completion", "content", "answer")
_RATINGS = ("score", "rating", "overall_score")

#: What people write for a good answer and for a bad one.
_GOOD = ("true", "yes", "good", "up", "thumbs_up", "desirable", "like")
_BAD = ("false", "no", "bad", "down", "thumbs_down", "undesirable", "dislike")

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

#: Remarks on rows.
JOINED = "Consecutive turns of one speaker are joined by a blank line."
OTHER_PROMPT = "The column with the prompt differs from the conversation of its answers, which counts."


def detect_preference(row: Mapping[str, Any], objective: ObjectiveKind) -> Layout | None:
    """Returns the layout of a row with preferences or judgements; None if it has none for the objective."""
    row = {name: value for name, value in row.items() if value is not None}
    if "chosen" in row and "rejected" in row:
        both = (row["chosen"], row["rejected"])
        has_turns = all(isinstance(text, str) and _TURN.match(text) for text in both)
        return "transcript" if has_turns and _find(row, _PROMPTS) is None else "preference"
    if _find(row, _PROMPTS) is not None and _has_scores(row):
        return "ranked"
    given = any(is_conversation(row.get(name)) for name in _CONVERSATIONS)
    given |= _find(row, _PROMPTS) is not None and _find(row, _COMPLETIONS) is not None
    return "judged" if FAMILY[objective] == "judged" and given and _find(row, _LABELS) is not None else None


def _has_scores(row: Mapping[str, Any]) -> bool:
    """Returns whether a row has a list of answers with scores."""
    answers = _find(row, _LISTS)
    if not isinstance(answers, list) or not answers:
        return False
    inside = any(isinstance(each, Mapping) and _find(each, _RATINGS) is not None for each in answers)
    return inside or any(isinstance(row.get(name), list) for name in (*_SCORES, "ranks"))


def parse_preference(row: Mapping[str, Any], layout: Layout, origin: str) -> Example:
    """Reads a row: one text for every answer, named ``chosen`` and ``rejected`` or ``answer_1`` and so on.

    A judged row has a single answer, so it is an example without names. Each answer has the label ``scores``; an answer
    that nobody scored has NaN.

    Raises:
        ValueError: The row does not fit the layout.
        DataError: A message has an image, audio or video.
    """
    match layout:
        case "preference":
            answers = {name: _require(row, (name,)) for name in ("chosen", "rejected")}
            return _make(row, answers, _read_pair_scores(row), origin)
        case "transcript":
            return _read_transcripts(row, origin)
        case "judged":
            return _read_judged(row, origin)
        case "ranked":
            return _read_ranked(row, origin)
    raise AssertionError(layout)


def _make(row: Mapping[str, Any], answers: Mapping[str, Any], scores: Sequence[float], origin: str) -> Example:
    texts, remarks = _join(row, answers, origin)
    scored = zip(texts.items(), scores, strict=True)
    found = {name: replace(text, labels={"scores": score}) for (name, text), score in scored}
    return Example(origin, texts=found, remarks=remarks)


def _join(
    row: Mapping[str, Any], answers: Mapping[str, Any], origin: str
) -> tuple[dict[str, Example], tuple[str, ...]]:
    """Returns the texts of the answers, each with its prompt, and remarks.

    What a cell contains is decided by its type alone: a text, a list of messages, or a single message.
    """
    answers = {name: [value] if isinstance(value, Mapping) else value for name, value in answers.items()}
    prompt = _find(row, _PROMPTS)
    if all(isinstance(value, str) for value in answers.values()):
        if prompt is None:
            prompt, answers = _split_prompt(answers)
        if isinstance(prompt, str):
            return {name: _pair(row, prompt, text, origin) for name, text in answers.items()}, ()
        turns = read_messages(prompt, origin)
        added = {name: [Message("assistant", text)] for name, text in answers.items()}
        return {name: _conversation(row, [*turns, *own], origin) for name, own in added.items()}, ()
    read = {name: read_messages(value, origin) for name, value in answers.items()}
    asked = [] if prompt is None else [Message("user", prompt)] if isinstance(prompt, str) else None
    asked = read_messages(prompt, origin) if asked is None else asked
    if all(turns[0].role in ("assistant", "tool") for turns in read.values()):
        if not asked:
            raise ValueError("the answers have no prompt")
        return {name: _conversation(row, [*asked, *turns], origin) for name, turns in read.items()}, ()
    turns = next(iter(read.values()))
    shared = turns[: shared_length(list(read.values()))]
    remarks = () if _starts_with(shared, asked) else (OTHER_PROMPT,)
    if remarks and not isinstance(prompt, str):
        raise ValueError("the conversations of the answers do not begin with the messages of the prompt")
    return {name: _conversation(row, turns, origin) for name, turns in read.items()}, remarks


def _pair(row: Mapping[str, Any], prompt: str, completion: str, origin: str) -> Example:
    if not (isinstance(row.get("system"), str) and row["system"].strip()) and not row.get("tools"):
        return Example(origin, prompt=prompt, completion=completion)
    turns = [Message("user", prompt.strip()), Message("assistant", completion.strip())]
    return _conversation(row, turns, origin)


def _conversation(row: Mapping[str, Any], turns: Sequence[Message], origin: str) -> Example:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[0].role not in ("system", "developer"):
        turns = [Message("system", system), *turns]
    return Example(origin, messages=tuple(turns), tools=read_tools(row.get("tools")))


def _split_prompt(answers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Returns what texts begin with in common, up to white space or the last ``Assistant:``, and their rests."""
    texts = list(answers.values())
    prefix = texts[0][: shared_length(texts)]
    turn = prefix.rfind("\n\nAssistant:")
    end = turn + len("\n\nAssistant:") if turn >= 0 else len(prefix)
    while turn < 0 and end and not prefix[end - 1].isspace():
        end -= 1
    return prefix[:end], {name: text[end:] for name, text in answers.items()}


def shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Returns how many first elements sequences have in common."""
    first, shortest = sequences[0], min(map(len, sequences))
    return next((i for i in range(shortest) if any(each[i] != first[i] for each in sequences)), shortest)


def _starts_with(shared: Sequence[Message], asked: Sequence[Message]) -> bool:
    """Returns whether a prompt is the beginning of conversations, or their last question if it is a single text."""
    if not asked:
        return True
    spoken = [turn for turn in shared if turn.role not in ("system", "developer")]
    own = [turn for turn in asked if turn.role not in ("system", "developer")]
    if len(own) == 1:
        return any(turn.content.strip() == own[0].content.strip() for turn in spoken if turn.role == "user")
    return spoken[: len(own)] == own


def _read_transcripts(row: Mapping[str, Any], origin: str) -> Example:
    texts, remarks = {}, set[str]()
    for name in ("chosen", "rejected"):
        turns = list(_split_turns(_text(_require(row, (name,)), name)))
        joined = [
            Message(role, "\n\n".join(turn.content for turn in part if turn.content))
            for role, part in ((role, list(part)) for role, part in groupby(turns, lambda turn: turn.role))
        ]
        remarks |= {JOINED} if len(joined) < len(turns) else set()
        texts[name] = _conversation(row, joined, origin)
    scores = zip(texts.items(), _read_pair_scores(row), strict=True)
    found = {name: replace(text, labels={"scores": score}) for (name, text), score in scores}
    return Example(origin, texts=found, remarks=tuple(sorted(remarks)))


def _split_turns(text: str) -> Iterator[Message]:
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise ValueError("a transcript must begin with 'Human:' or 'Assistant:'")
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        end = len(text) if after is None else after.start()
        yield Message(_ROLES[mark[1]], text[mark.end() : end].strip())


def _read_pair_scores(row: Mapping[str, Any]) -> tuple[float, float]:
    for better, worse in _PAIR_SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            return _number(row[better], better), _number(row[worse], worse)
    if row.get("margin") is not None:
        return _number(row["margin"], "margin"), 0.0
    return 1.0, 0.0


def _read_judged(row: Mapping[str, Any], origin: str) -> Example:
    score = _read_label(_require(row, _LABELS))
    turns = _find(row, _CONVERSATIONS)
    if turns is not None:
        key = ("role", "content") if is_conversation(turns) else ("from", "value")
        return replace(_conversation(row, read_messages(turns, origin, *key), origin), labels={"scores": score})
    _require(row, _PROMPTS)
    texts, remarks = _join(row, {"answer": _require(row, _COMPLETIONS)}, origin)
    return replace(texts["answer"], labels={"scores": score}, remarks=remarks)


def _read_label(value: Any) -> float:
    if isinstance(value, str):
        word = value.strip().lower().replace(" ", "_").replace("-", "_")
        if word in _GOOD or word in _BAD:
            return float(word in _GOOD)
    return _number(value, "label")


def _read_ranked(row: Mapping[str, Any], origin: str) -> Example:
    given = _require(row, _LISTS)
    if not isinstance(given, list) or not given:
        raise ValueError("the answers are no list, or it is empty")
    _require(row, _PROMPTS)
    scores = _find(row, _SCORES)
    if scores is None and row.get("ranks") is not None:
        scores = [None if rank is None else -_number(rank, "ranks") for rank in _list(row["ranks"], "ranks")]
    if scores is None:
        scores = [_find(each, _RATINGS) if isinstance(each, Mapping) else None for each in given]
        if all(score is None for score in scores):
            raise ValueError("the answers have no scores: neither a column 'scores' nor a 'score' with each answer")
    scores = _list(scores, "scores")
    if len(scores) != len(given):
        raise ValueError(f"{len(given)} answers have {len(scores)} scores")
    answers = {f"answer_{i}": _answer(each) for i, each in enumerate(given, 1)}
    return _make(row, answers, [_score(score) for score in scores], origin)


def _answer(value: Any) -> Any:
    """Returns the text or the messages of an answer in a list."""
    if not isinstance(value, Mapping) or "role" in value:
        return value
    found = _find(value, (*_TEXTS, *_CONVERSATIONS))
    if found is None:
        raise ValueError(f"an answer has none of {', '.join(_TEXTS)}")
    return found


def _score(value: Any) -> float:
    """Returns a score; NaN for what means that there is none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "na", "none", "null")):
        return math.nan
    return _number(value, "score")


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name!r} is {value!r}, not a number")
    return number


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise ValueError(f"{name!r} must be a list")


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{name!r} is {type(value).__name__}, not text")


def _find(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _require(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    value = _find(row, names)
    if value is None:
        raise ValueError(f"{names[0]!r} is missing")
    return value
