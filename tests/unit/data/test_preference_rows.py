"""Layouts of preferences and judgements: which rows they fit, and what is read from them."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from ingle.config.data import Source
from ingle.data.layout_detection import detect_source, guess_objective
from ingle.data.layouts import parse_row
from ingle.data.preference_rows import JOINED, OTHER_PROMPT, detect_preference, shared_length
from ingle.data.sources import read_examples
from ingle.data.types import Message
from ingle.errors import DataError

ASK = [{"role": "user", "content": "what is two?"}]
SYSTEM = [{"role": "system", "content": "be brief"}]
TWO = ("a number", "a letter")


def answer(text):
    return [{"role": "assistant", "content": text}]


def read(row, layout="preference"):
    """Returns every answer as (messages or prompt and completion, score)."""
    example = parse_row(row, layout, "f:1")
    found = {}
    for name, text in (example.texts or {"": example}).items():
        turns = [(m.role, m.content) for m in text.messages] or [("prompt", text.prompt), ("text", text.completion)]
        found[name] = (turns, text.labels["scores"])
    return found


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "what is two?", "chosen": TWO[0], "rejected": TWO[1]}, ["prompt", "text"]),
        ({"question": "what is two?", "chosen": TWO[0], "rejected": TWO[1], "id": 7}, ["prompt", "text"]),
        ({"prompt": ASK, "chosen": answer(TWO[0]), "rejected": answer(TWO[1])}, ["user", "assistant"]),
        ({"prompt": ASK, "chosen": answer(TWO[0])[0], "rejected": answer(TWO[1])[0]}, ["user", "assistant"]),
        ({"prompt": ASK, "chosen": TWO[0], "rejected": TWO[1]}, ["user", "assistant"]),
        ({"prompt": "what is two?", "chosen": answer(TWO[0]), "rejected": answer(TWO[1])}, ["user", "assistant"]),
        ({"chosen": ASK + answer(TWO[0]), "rejected": ASK + answer(TWO[1])}, ["user", "assistant"]),
        (
            {"prompt": "what is two?", "chosen": ASK + answer(TWO[0]), "rejected": ASK + answer(TWO[1])},
            ["user", "assistant"],
        ),
        (
            {"prompt": ASK, "chosen": SYSTEM + ASK + answer(TWO[0]), "rejected": SYSTEM + ASK + answer(TWO[1])},
            ["system", "user", "assistant"],
        ),
        (
            {"prompt": "what is two?", "system": "be brief", "chosen": TWO[0], "rejected": TWO[1]},
            ["system", "user", "assistant"],
        ),
    ],
)
def test_every_form_of_a_pair_has_the_same_content(row, turns):
    assert detect_preference(row, "dpo") == "preference"
    found = read(row)
    assert list(found) == ["chosen", "rejected"]
    for (said, score), text, expected in zip(found.values(), TWO, (1.0, 0.0), strict=True):
        assert [role for role, _ in said] == turns
        assert said[-2:] == [(turns[-2], "what is two?"), (turns[-1], text)]
        assert score == expected
    assert not parse_row(row, "preference", "f:1").remarks


def test_texts_without_a_prompt_share_their_beginning():
    found = read({"chosen": "two is a number", "rejected": "two is a name"})
    assert [said for said, _ in found.values()] == [
        [("prompt", "two is a "), ("text", "number")],
        [("prompt", "two is a "), ("text", "name")],
    ]
    raw = read({"chosen": "\n\nHuman: a\n\nAssistant: It is b", "rejected": "\n\nHuman: a\n\nAssistant: It is c"})
    assert raw["rejected"][0] == [("prompt", "\n\nHuman: a\n\nAssistant:"), ("text", " It is c")]


def test_a_prompt_that_differs_from_the_conversation_is_named():
    row = {"prompt": "what is three?", "chosen": ASK + answer(TWO[0]), "rejected": ASK + answer(TWO[1])}
    assert parse_row(row, "preference", "f:1").remarks == (OTHER_PROMPT,)
    with pytest.raises(DataError, match="does not fit") as caught:
        parse_row({**row, "prompt": [{"role": "user", "content": "what is three?"}]}, "preference", "f:1")
    assert "do not begin with" in str(caught.value.why)


@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({"score_chosen": 8.5, "score_rejected": "6"}, [8.5, 6.0]),
        ({"chosen_score": 2, "rejected_score": 1}, [2.0, 1.0]),
        ({"margin": 0.7}, [0.7, 0.0]),
        ({}, [1.0, 0.0]),
    ],
)
def test_scores_of_pairs(columns, scores):
    found = read({"prompt": "a", "chosen": "b", "rejected": "c", **columns})
    assert [score for _, score in found.values()] == scores


def test_transcripts_become_conversations():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant:"
    row = {"chosen": f"{text} one\n\ntwo", "rejected": f"{text} \n\nAssistant: three"}
    assert detect_preference(row, "reward") == "transcript"
    found = read(row, "transcript")
    asked = [("user", "a"), ("assistant", "b"), ("user", "c: Human: d")]
    assert found["chosen"] == ([*asked, ("assistant", "one\n\ntwo")], 1.0)
    assert found["rejected"] == ([*asked, ("assistant", "three")], 0.0)
    assert parse_row(row, "transcript", "f:1").remarks == (JOINED,)


@pytest.mark.parametrize(
    ("label", "score"),
    [(True, 1), (False, 0), (1, 1), ("0", 0), ("Thumbs up", 1), ("bad", 0), ("undesirable", 0), (4.5, 4.5)],
)
def test_judged_answers(label, score):
    row = {"prompt": "a", "completion": "b", "label": label}
    assert detect_preference(row, "kto") == "judged"
    assert read(row, "judged") == {"": ([("prompt", "a"), ("text", "b")], score)}
    chat = {"messages": ASK + answer("b"), "label": label}
    assert read(chat, "judged")[""] == ([("user", "what is two?"), ("assistant", "b")], score)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, None, 0.5]},
        {"instruction": "a", "responses": ["b", "c", "d"], "ratings": ["1", "N/A", "0.5"]},
        {"prompt": "a", "answers": [{"text": "b", "score": 1}, {"text": "c"}, {"response": "d", "rating": 0.5}]},
    ],
)
def test_ranked_answers_keep_their_order(row):
    assert detect_preference(row, "dpo") == "ranked"
    found = read(row, "ranked")
    assert list(found) == ["answer_1", "answer_2", "answer_3"]
    assert [said[1][1] for said, _ in found.values()] == ["b", "c", "d"]
    one, none, half = (score for _, score in found.values())
    assert (one, half) == (1, 0.5) and math.isnan(none)


def test_a_lower_rank_is_better():
    found = read({"prompt": ASK, "completions": ["b", "c"], "ranks": [2, 1]}, "ranked")
    assert [score for _, score in found.values()] == [-2, -1]


@pytest.mark.parametrize(
    ("row", "layout", "why"),
    [
        ({"prompt": "a", "chosen": "b"}, "preference", "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "preference", "no list of messages"),
        ({"chosen": answer("b"), "rejected": answer("c")}, "preference", "no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}, "preference", "'margin' is 'wide'"),
        ({"chosen": "Human: a", "rejected": "b"}, "transcript", "must begin with 'Human:'"),
        ({"prompt": "a", "completion": "b", "label": "so-so"}, "judged", "'label' is 'so-so'"),
        ({"prompt": "a", "completions": ["b", "c"]}, "ranked", "no scores"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "ranked", "2 answers have 1 scores"),
        ({"prompt": "a", "completions": [], "scores": []}, "ranked", "empty"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, math.inf]}, "ranked", "inf"),
    ],
)
def test_misfits_name_their_row_and_the_reason(row, layout, why):
    with pytest.raises(DataError, match="does not fit the layout") as caught:
        parse_row(row, layout, "f:3")
    assert caught.value.where == "f:3"
    assert why in str(caught.value.why)


def test_objectives_and_layouts_must_suit_each_other(tmp_path):
    judged = {"prompt": "a", "completion": "b", "label": True}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match="do not fit the objective dpo") as caught:
        detect_source(judged, Source(path="f"), "dpo", "f", "f:1")
    assert "kto" in str(caught.value.fix)
    with pytest.raises(DataError, match="preference data") as caught:
        detect_source(pair, Source(path="f"), "sft", "f", "f:1")
    assert "--objective.kind=dpo" in str(caught.value.fix)
    assert [guess_objective(row, "f:1") for row in (judged, pair, {"prompt": "a", "completion": "b"})] == [
        "kto",
        "dpo",
        "sft",
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for layout, objective in (("preference", "sft"), ("judged", "dpo"), ("text", "kto")):
        source = Source(path=str(tmp_path / "a.jsonl"), layout=layout)
        with pytest.raises(DataError, match="does not suit"):
            list(read_examples([source], objective=objective))


def test_shared_length():
    assert shared_length(["abcd", "abd", "abcc"]) == 2
    assert shared_length(["ab", "ab"]) == 2
    assert shared_length([[Message("user", "a")], []]) == 0


def test_all_transcripts_of_real_people_are_accounted_for(shared_data):
    path = shared_data / "hh-rlhf" / "harmless-test.jsonl.gz"
    if not path.is_file():
        pytest.skip("no transcripts")
    found = Counter[str]()
    for example in read_examples([Source(path=str(path))], objective="dpo"):
        chosen, rejected = (text.messages for text in example.texts.values())
        shared = shared_length([chosen, rejected])
        found["rows"] += 1
        found["joined"] += JOINED in example.remarks
        found["empty"] += not (chosen[-1].content and rejected[-1].content)
        found["one turn differs"] += (
            len(chosen) == len(rejected) == shared + 1 and chosen[-1].role == rejected[-1].role == "assistant"
        )
    assert found == {"rows": 2312, "joined": 9, "empty": 4, "one turn differs": 2312}
