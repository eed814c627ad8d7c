"""Preferences as documents: the tokens of sft for every answer, rows kept together, and nothing cut in silence."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from ingle import env
from ingle.config.data import DataConfig
from ingle.config.preferences import Dpo, Kto, Reward
from ingle.data import build_dataset, collate, make_sequences
from ingle.data.corruption import Target
from ingle.data.holdout import choose, find_groups
from ingle.data.preference_doctor import examine
from ingle.data.types import IGNORE_INDEX
from ingle.errors import ConfigError, DataError
from ingle.events import Warned
from ingle.objectives.seq2seq import Joining
from tests import tiny_tokenizers
from tests.conftest import make_tokenizer

DPO, KTO, REWARD = Dpo(kind="dpo"), Kto(kind="kto"), Reward(kind="reward")
WORDS = ["the", "quick", "brown", "fox", "jumps", "lazy", "dog", "hello", "world", "how", "you", "two", "four", "yes"]
#: A template as Llama 2's: BOS opens every exchange.
EXCHANGES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
TOKENIZERS = {
    "chat": make_tokenizer,
    "plain": lambda: make_tokenizer(chat_template=None, bos="<s>", add_bos=True),
    "exchanges": lambda: make_tokenizer(chat_template=EXCHANGES, bos="<s>"),
}


def say(rng, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def build(path, rows, tokenizer, objective=DPO, **options):
    """Writes and reads rows; returns the dataset and its warnings."""
    kind = options.pop("model_kind", "causal")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, events = DataConfig.model_validate({"sources": [str(path)], **options}), []
    dataset = build_dataset(data, tokenizer, objective=objective, model_kind=kind, sink=events.append)
    return dataset, {event.message: event.count for event in events if isinstance(event, Warned)}


def answers_of(dataset, tokenizer):
    samples = [dataset.sample(i) for i in range(len(dataset))]
    return [tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX]) for sample in samples]


def scores_of(dataset):
    return dataset.document_column("scores").tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_answer_has_the_tokens_and_the_mask_of_sft(tmp_path, name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    if name == "plain":
        asked = [say(rng) + rng.choice(["", "\n", " "]) for _ in range(30)]
        rows = [{"prompt": text, "chosen": say(rng), "rejected": say(rng) + " x"} for text in asked]
        sides = [{"prompt": r["prompt"], "completion": r[side]} for r in rows for side in ("chosen", "rejected")]
    else:
        shared = [chat(*(say(rng) for _ in range(rng.choice((1, 3))))) for _ in range(30)]
        rows = [{"chosen": turns + chat("", say(rng))[1:], "rejected": turns + chat("", "x")[1:]} for turns in shared]
        sides = [{"messages": row[side]} for row in rows for side in ("chosen", "rejected")]
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer)
    expected, _ = build(tmp_path / "b.jsonl", sides, tokenizer, "sft", train_on="last")
    assert len(dataset) == len(expected) == 60
    for i in range(60):
        own, other = dataset.sample(i), expected.sample(i)
        assert own.input_ids.tolist() == other.input_ids.tolist()
        assert own.labels.tolist() == other.labels.tolist()
        assert {key: value.tolist() for key, value in own.columns.items()} == {
            "scores": [1 - i % 2],
            "truncated": [0],
            "group_ids": [i // 2],
        }
        assert dataset.text_name(i) == ("chosen", "rejected")[i % 2]


def test_a_packed_batch_has_the_scores_and_rows_of_its_answers(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completions": ["b", "c", "d d"], "scores": [3, 1, 2]}]
    rows += [{"prompt": "what is two?", "completions": ["e", "f"], "scores": [0.5, -1]}]
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, max_seq_len=1024)
    (sequence,) = make_sequences(dataset, DataConfig(sources="x", max_seq_len=1024), 0)
    batch = collate([dataset.sample(int(i)) for i in sequence])
    by_row = dict(zip(batch.columns["group_ids"].tolist(), [0] * 5, strict=True))
    assert sorted(by_row) == [0, 1]
    found = list(zip(batch.columns["group_ids"].tolist(), batch.columns["scores"].tolist(), strict=True))
    assert sorted(found) == [(0, 1.0), (0, 2.0), (0, 3.0), (1, -1.0), (1, 0.5)]
    assert [part.columns["group_ids"].unique().numel() for part in batch.split(2)] == [1, 1]
    assert batch.columns["truncated"].tolist() == [0] * 5


def test_all_turns_after_the_common_ones_are_the_answer(tmp_path, tokenizer):
    shared = chat("hello", "yes")
    row = {"chosen": shared + chat("two", "a", "b", "c"), "rejected": shared + chat("four", "d")}
    contained = {"chosen": chat("hello", "yes"), "rejected": chat("hello", "yes", "two", "four")}
    dataset, _ = build(tmp_path / "a.jsonl", [row, contained], tokenizer)
    end = "<|im_end|>"
    assert answers_of(dataset, tokenizer) == [f"a{end}c{end}", f"d{end}", f"yes{end}", f"four{end}"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "All answers are equal."),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "Empty answer."),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0}, "All answers have the same score."),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1},
            "The rejected answer has the higher score.",
        ),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, None]}, "Fewer than two answers have a score."),
        ({"prompt": "a", "completions": ["b", " ", "c"], "scores": [1, 2, 1]}, "Empty answer."),
    ],
)
def test_rows_that_compare_nothing_are_dropped_and_counted(tmp_path, tokenizer, row, reason):
    kept = {key: value for key, value in {"prompt": "a", **row}.items() if key == "prompt"}
    rows = [{**kept, **({"completions": ["x", "y"], "scores": [1, 2]} if "scores" in row else
                        {"chosen": "x", "rejected": "y"})}, row]  # fmt: skip
    dataset, warnings = build(tmp_path / "a.jsonl", rows, tokenizer)
    assert len(dataset) == 2
    assert [(remark.reason, remark.count) for remark in dataset.stats.dropped] == [(reason, 1)]
    assert warnings[f"Rows skipped: {reason}"] == 1


def test_an_empty_answer_of_many_leaves_the_others(tmp_path, tokenizer):
    row = {"prompt": "a", "completions": ["b", " ", "c"], "scores": [1, 3, 2]}
    dataset, warnings = build(tmp_path / "a.jsonl", [row], tokenizer)
    assert scores_of(dataset) == [1, 2]
    assert warnings == {"Single answers are left out: Empty answer.": 1}


def test_judged_answers_stand_alone(tmp_path, tokenizer):
    judged = {"prompt": "a", "completion": "b", "label": True}
    pair = {"prompt": "a", "chosen": "c", "rejected": "d", "score_chosen": 2, "score_rejected": 9}
    ranked = {"prompt": "a", "completions": ["e", "f", "g"], "scores": [1, 4, None]}
    for number, (row, expected) in enumerate([(judged, [1]), (pair, [1, 0]), (ranked, [0, 1])]):
        objective = KTO if row is not ranked else Kto(kind="kto", threshold=3)
        dataset, _ = build(tmp_path / f"{number}.jsonl", [row], tokenizer, objective)
        assert scores_of(dataset) == expected
        assert dataset.groups is None
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    dataset, _ = build(tmp_path / "a.jsonl", [pair, same], tokenizer, KTO)
    assert [(remark.reason, remark.count) for remark in dataset.stats.dropped] == [("All answers are equal.", 1)]
    good = {"path": str(tmp_path / "good.jsonl"), "label": "good"}
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert scores_of(build_dataset(DataConfig(sources=[good]), tokenizer, objective=KTO)) == [1]
    with pytest.raises(ConfigError, match="only with a threshold"):
        build(tmp_path / "a.jsonl", [ranked], tokenizer, KTO)


TWICE = "{{ bos_token }}" + "{{ bos_token }}" + EXCHANGES.replace("<s>", "")
OPEN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"chat_template": TWICE, "bos": "<s>"}, "begins a text more than once"),
        ({"chat_template": OPEN, "eos": None, "pad": None}, "no end-of-turn token"),
    ],
)
def test_wrong_special_tokens_are_refused(tmp_path, options, why):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match="special tokens") as caught:
        build(tmp_path / "a.jsonl", [row], make_tokenizer(**options))
    assert why in str(caught.value.why) and str(caught.value.where).endswith(":1")


def test_an_end_of_turn_inside_of_an_answer_is_text_unless_it_is_kept(tmp_path, tokenizer):
    row = {"prompt": "a", "chosen": "b<|im_end|> c", "rejected": "d"}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    dataset, _ = build(tmp_path / "a.jsonl", [row], tokenizer)
    assert [int((dataset.sample(i).labels == end).sum()) for i in range(2)] == [1, 1]
    _, warnings = build(tmp_path / "a.jsonl", [row], tokenizer, control_tokens="keep")
    assert any("end-of-turn token more than once" in message for message in warnings)


def test_a_long_prompt_loses_its_oldest_messages_and_answers_share_the_rest(tmp_path, tokenizer):
    turns = [{"role": "system", "content": "be brief"}, *chat("one " * 9, "yes", "two " * 9, "no", "three " * 9)]
    row = {"prompt": turns, "chosen": "a", "rejected": "b b b b"}
    whole, _ = build(tmp_path / "a.jsonl", [row], tokenizer)
    dataset, warnings = build(tmp_path / "a.jsonl", [row], tokenizer, max_seq_len=int(whole.lengths.max()) - 1)
    shorter = {**row, "prompt": [turns[0], *turns[3:]]}
    expected, _ = build(tmp_path / "b.jsonl", [shorter], tokenizer)
    assert [dataset.sample(i).input_ids.tolist() for i in range(2)] == [
        expected.sample(i).input_ids.tolist() for i in range(2)
    ]
    assert dataset.stats.truncated_documents == 2
    assert dataset.stats.truncated_tokens == whole.num_tokens - expected.num_tokens
    assert any("oldest messages" in message for message in warnings)


def test_a_long_message_loses_its_first_tokens_and_bos_stays(tmp_path):
    tokenizer = make_tokenizer(chat_template=None, bos="<s>", add_bos=True)
    row = {"prompt": "word " * 40 + "\n", "chosen": "yes yes yes", "rejected": "no"}
    whole, _ = build(tmp_path / "a.jsonl", [row], tokenizer)
    dataset, _ = build(tmp_path / "a.jsonl", [row], tokenizer, max_seq_len=32)
    lost = int(whole.lengths.max()) - 32
    for i in range(2):
        own, other = dataset.sample(i), whole.sample(i)
        assert own.input_ids.tolist() == [tokenizer.bos_token_id, *other.input_ids[1 + lost :].tolist()]
        assert own.labels[own.labels != IGNORE_INDEX].tolist() == other.labels[other.labels != IGNORE_INDEX].tolist()
    assert dataset.document_column("truncated").tolist() == [0, 0]


def test_answers_are_cut_only_on_request_and_then_marked(tmp_path, tokenizer):
    rows = [
        {"prompt": "two " * 20, "chosen": "yes " * 60, "rejected": "no"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    for too_long in ("auto", "drop"):
        dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, max_seq_len=48, too_long=too_long)
        assert len(dataset) == 2 and dataset.stats.num_dropped == 1
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, max_seq_len=48, too_long="truncate")
    assert dataset.document_column("truncated").tolist() == [1, 0, 0, 0]
    assert dataset.stats.cut_ends == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [int((dataset.sample(i).labels == end).sum()) for i in range(2)] == [0, 1]
    prompts = [s.input_ids[: np.argmax(s.labels != IGNORE_INDEX)].tolist() for s in map(dataset.sample, range(2))]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 12
    with pytest.raises(ConfigError, match="cannot be split"):
        build(tmp_path / "a.jsonl", rows, tokenizer, too_long="split")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizers.bert(), tiny_tokenizers.roberta(), tiny_tokenizers.t5()])
def test_scores_read_prompt_and_answer_as_a_pair_of_texts(tmp_path, tokenizer):
    row = {"prompt": "the quick brown fox", "chosen": "jumps over the dog", "rejected": "was it good?"}
    dataset, _ = build(tmp_path / "a.jsonl", [row], tokenizer, REWARD, model_kind="encoder")
    for i, side in enumerate(("chosen", "rejected")):
        expected, sample = tokenizer(row["prompt"], row[side]), dataset.sample(i)
        assert sample.input_ids.tolist() == expected["input_ids"]
        if "token_type_ids" in tokenizer.model_input_names:
            assert sample.columns["token_type_ids"].tolist() == expected["token_type_ids"]
        said = tokenizer(row[side], add_special_tokens=False)["input_ids"]
        assert sample.labels[sample.labels != IGNORE_INDEX].tolist() == said
    short, _ = build(
        tmp_path / "a.jsonl", [row], tokenizer, REWARD, model_kind="encoder", max_seq_len=int(dataset.lengths.max()) - 1
    )
    assert [len(short.sample(i).input_ids) - len(dataset.sample(i).input_ids) for i in range(2)] == [-1, -1]


def test_an_encoder_decoder_has_a_source_for_every_answer(tmp_path):
    tokenizer = tiny_tokenizers.t5()
    rows = [{"prompt": "the house is small", "chosen": "das Haus", "rejected": "ist klein", "margin": 2}]
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, model_kind="encoder_decoder")
    assert [dataset.text_name(i) for i in range(4)] == ["source", "chosen", "source", "rejected"]
    samples = [dataset.sample(i) for i in range(4)]
    joined = Joining(Target(0))(samples, [])
    for pair, side, score in zip(joined, ("chosen", "rejected"), (2, 0), strict=True):
        assert pair.input_ids.tolist() == tokenizer(rows[0]["prompt"])["input_ids"]
        assert pair.columns["decoder_labels"].tolist() == tokenizer(rows[0][side])["input_ids"]
        assert (pair.columns["scores"].tolist(), pair.columns["group_ids"].tolist()) == ([score], [0])
    batch = collate(joined)
    assert (batch.num_documents, batch.columns["scores"].tolist()) == (2, [2.0, 0.0])
    turns = chat("hello", "yes", "how are you") + chat("", "two")[1:]
    judged, _ = build(
        tmp_path / "b.jsonl", [{"messages": turns, "label": True}], tokenizer, KTO, model_kind="encoder_decoder"
    )
    source = tokenizer("Human: hello\n\nAssistant: yes\n\nHuman: how are you")["input_ids"]
    assert judged.sample(0).input_ids.tolist() == source


def test_rows_in_the_cache_are_those_in_memory(tmp_path, tokenizer, monkeypatch):
    rng = random.Random(0)
    rows = []
    for number in range(120):
        size = 2 + number // 50  # later chunks have more answers
        said = [f"{say(rng)} {i}" for i in range(size)]
        rows.append({"prompt": f"{number} {say(rng)}", "completions": said, "scores": [rng.random() for _ in said]})
    expected, _ = build(tmp_path / "a.jsonl", rows, tokenizer)
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ingle.data.dataset_builder._CACHED_BYTES", 0)
    for name in ("_MIN_BYTES", "_MEAN_BYTES"):
        monkeypatch.setattr(f"ingle.data.chunks.{name}", 2000)
    monkeypatch.setattr(env, "num_processors", lambda: 1)
    for _ in range(2):
        dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer)
        assert dataset.groups.names == ("answer_1", "answer_2", "answer_3", "answer_4")
        assert dataset.fingerprint() == expected.fingerprint()
        assert [dataset.text_name(i) for i in range(len(dataset))] == [
            expected.text_name(i) for i in range(len(dataset))
        ]
    assert any((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("packing", [True, False])
def test_a_long_row_does_not_lengthen_the_other_sequences(tmp_path, tokenizer, packing):
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    rows.append({"prompt": "a", "completions": ["b " * 40, "c " * 40, "d " * 40], "scores": [1, 2, 3]})
    rows[:-1] = [{"prompt": r["prompt"], "completions": ["yes", "no"], "scores": [1, 0]} for r in rows[:-1]]
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, max_seq_len=96)
    data = DataConfig(sources="x", max_seq_len=96, packing=packing)
    sequences = [sequence.tolist() for sequence in make_sequences(dataset, data, 0)]
    assert sorted(i for sequence in sequences for i in sequence) == list(range(43))
    assert [40, 41, 42] in sequences
    lengths = [int(dataset.lengths[sequence].sum()) for sequence in sequences if sequence != [40, 41, 42]]
    assert max(lengths) <= 96 and (len(lengths) < 20) is packing


def test_prompts_decide_what_is_held_out(tmp_path, tokenizer):
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=14)) for _ in range(40)]
    refusal = "no no no two four yes hello world over you today no no no two four"
    rows = [{"prompt": p, "chosen": refusal, "rejected": f"{say(rng)} x"} for p in prompts]
    rows += [{"prompt": p, "chosen": f"{say(rng)} y", "rejected": refusal} for p in prompts[:10]]
    for objective in (DPO, KTO):
        dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, objective, validation=0.2)
        groups = find_groups(dataset)
        assert len(np.unique(groups)) == 40
        sides = choose(groups, 0.2, 0)
        of_row = sides.reshape(50, 2)
        assert (of_row[:, 0] == of_row[:, 1]).all() and (of_row[:10] == of_row[40:]).all()
        assert 4 <= of_row[:40, 0].sum() <= 16


def judge(rng, number, *, flip, longer_wins):
    """Returns a pair whose longer answer is better with a probability, judged wrongly with another."""
    good, bad = f"{number} " + "yes " * 8, f"{number} " + "no " * 3
    if rng.random() > longer_wins:
        good, bad = bad, good
    rows = [{"prompt": f"ask {number}", "chosen": good, "rejected": bad} for _ in range(2)]
    return [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} if rng.random() < flip else r for r in rows]


def test_the_doctor_finds_what_was_planted(tmp_path, tokenizer):
    rng = random.Random(3)
    rows = [row for number in range(400) for row in judge(rng, number, flip=0.1, longer_wins=0.8)]
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer)
    report = examine(dataset, is_judged=False)
    assert (report.rows, report.prompts, report.pairs, report.repeated) == (800, 400, 800, 400)
    differ = sum(rows[i] != rows[i + 1] for i in range(0, 800, 2))
    assert (report.contradictory, report.exact) == (differ, 400 - differ)
    first, second = report.contradictions[0].first, report.contradictions[0].second
    assert int(second.rpartition(":")[2]) == int(first.rpartition(":")[2]) + 1
    assert report.noise.low <= 0.1 <= report.noise.high and report.noise.high < 0.16
    d = differ / 400
    assert 2 * report.noise.share * (1 - report.noise.share) == pytest.approx(d)
    # Wrong judgements turn 0.8 into 0.8 * 0.9 + 0.2 * 0.1.
    assert report.longer_wins.low <= 0.74 <= report.longer_wins.high
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in rows])
    assert report.longer_wins.share == pytest.approx(longer)


def test_the_doctor_counts_cut_answers_ties_and_classes(tmp_path, tokenizer):
    said = [f"{i} " + "yes " * (40 if i < 3 else 2) for i in range(10)]
    rows = [{"prompt": "a", "chosen": text, "rejected": f"{i} no"} for i, text in enumerate(said)]
    options = {"max_seq_len": 32, "too_long": "truncate"}
    dataset, _ = build(tmp_path / "a.jsonl", rows, tokenizer, **options)
    report = examine(dataset, is_judged=False)
    assert (report.better_truncated, report.worse_truncated, report.half_truncated) == (3, 0, 3)
    assert (report.repeated, report.noise) == (0, None)
    ranked = [{"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 1, 2]}]
    dataset, _ = build(tmp_path / "b.jsonl", ranked, tokenizer)
    report = examine(dataset, is_judged=False)
    assert (report.pairs, report.ties) == (2, 1)
    judged = [{"prompt": "a", "completion": "b", "label": label} for label in (True, True, False)]
    dataset, _ = build(tmp_path / "c.jsonl", judged, tokenizer, KTO)
    report = examine(dataset, is_judged=True)
    assert (report.good, report.bad, report.contradictory, report.exact) == (2, 1, 1, 1)


@pytest.mark.sweep
def test_all_rows_of_real_people_are_kept_or_counted(shared_data, tokenizer):
    path = shared_data / "hh-rlhf" / "harmless-test.jsonl.gz"
    if not path.is_file():
        pytest.skip("no transcripts")
    data = DataConfig(sources=[str(path)], max_seq_len=4096)
    dataset = build_dataset(data, tokenizer, objective=DPO)
    assert (dataset.stats.rows, len(dataset)) == (2312, 2 * 2308)
    assert [(remark.reason, remark.count) for remark in dataset.stats.dropped] == [("Empty answer.", 4)]
    assert [remark.count for remark in dataset.stats.remarks] == [9]
    report = examine(dataset, is_judged=False)
    assert report.contradictory == report.exact == 0
    assert report.longer_wins.share == pytest.approx(0.44, abs=0.01)
