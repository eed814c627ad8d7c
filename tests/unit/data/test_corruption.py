"""Corrupted texts: published lengths and examples, exact counts, and nothing lost that the target does not restore."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ingle.config.objective import Mlm, Span
from ingle.data.corruption import (
    UL2,
    Denoiser,
    Infilling,
    Masking,
    SpanCorruption,
    Target,
    WordTable,
    corrupted_lengths,
    find_sentinels,
    longest_text,
)
from ingle.data.corruption.infilling import infill, sentence_order, span_lengths
from ingle.data.corruption.spans import split_spans
from ingle.data.counters import Counters, Place, Purpose
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.errors import ConfigError
from tests.conftest import make_tokenizer

T5 = Denoiser(0.15, 3)
MASK = 4
SENTINELS = np.arange(10**6, 10**6 - 600, -1)
#: Names that occur in the special tokens of T5 and BERT.
SPECIAL = ("<mask>", *(f"<extra_id_{k}>" for k in range(30)))


@pytest.fixture(scope="module")
def masked() -> Any:
    """A tokenizer with a mask token and sentinels."""
    tokenizer = make_tokenizer(special=SPECIAL, bos="<s>")
    tokenizer.mask_token = "<mask>"
    return tokenizer


def as_sample(ids: Any) -> Sample:
    ids = np.asarray(ids, np.int32)
    return Sample(ids, ids)


# T5


@pytest.mark.parametrize(
    ("room", "density", "mean", "length", "target"),
    [
        (512, 0.15, 3, 568, 114), (512, 0.15, 8, 588, 100), (512, 0.15, 64, 600, 92), (512, 0.5, 8, 908, 512),
        (512, 0.5, 64, 1006, 512), (128, 0.15, 3, 141, 29), (64, 0.15, 3, 70, 14),
    ],
)  # fmt: skip
def test_the_longest_text_is_that_of_t5(room: int, density: float, mean: float, length: int, target: int) -> None:
    denoiser = Denoiser(density, mean)
    assert longest_text(room, [denoiser], {}) == length
    assert corrupted_lengths(length, [denoiser], {})[1] == target


def test_spans_become_sentinels_in_source_and_target() -> None:
    noise = np.isin(np.arange(10), (2, 3, 8, 9))
    source, target = split_spans(np.arange(10, 20), noise, np.arange(32099, 31999, -1), 1)
    assert source.tolist() == [10, 11, 32099, 14, 15, 16, 17, 32098, 1]
    assert target.tolist() == [32099, 12, 13, 32098, 18, 19, 1]


def restore(source: list[int], target: list[int]) -> list[int]:
    """Puts the spans of a target into its source."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= 10**5:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [part for token in source[:-1] for part in spans.get(token, [token])]


@pytest.mark.parametrize("denoiser", [T5, *UL2], ids=str)
def test_counts_are_exact_and_the_target_restores_the_text(denoiser: Denoiser) -> None:
    for length in (*range(2, 90), 568, 1000):
        noise = denoiser.mask(length, Counters(7, Place(3, length)))
        num_noise, num_spans = denoiser.counts(length)
        begins = np.flatnonzero(np.diff(noise.astype(int)) == 1)
        assert (noise.sum(), len(begins)) == (num_noise, num_spans)
        assert not noise[0] and noise[-1]
        ids = np.arange(length) + 2
        source, target = split_spans(ids, noise, SENTINELS, 1)
        assert (len(source), len(target)) == corrupted_lengths(length, [denoiser], {})
        assert restore(source.tolist(), target.tolist()) == ids.tolist()


def test_all_masks_are_equally_likely() -> None:
    denoiser = Denoiser(0.4, 1.5)
    assert denoiser.counts(8) == (3, 2)
    counts = Counter(tuple(denoiser.mask(8, Counters(1, Place(0, i)))) for i in range(8000))
    assert len(counts) == 8  # C(2, 1) ways to cut the noise, C(4, 1) to cut the rest
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 24.3  # 99.9 %, 7 degrees of freedom


def test_counts_round_as_t5_does() -> None:
    assert [Denoiser(0.15, 3).counts(length)[0] for length in (190, 350)] == [29, 53]  # float64 would give 28 and 52
    assert Denoiser(0.5, 3).counts(5)[0] == 2  # a half rounds to even
    assert Denoiser(0.9, 1).counts(10) == (9, 1)  # never more spans than there are tokens between them


def test_a_run_learns_what_its_counters_say(masked: Any) -> None:
    corrupt = SpanCorruption(Span(kind="span"), masked, Target(start=0), seed=0, max_length=100)
    samples = [as_sample(range(100, 100 + n)) for n in (20, 50, 9)]
    places = [Place(1, 4), Place(1, 5), Place(2, 6)]
    together = corrupt(samples, places)
    for sample, place, packed in zip(samples, places, together, strict=True):
        alone = corrupt([sample], [place])[0]
        assert alone.input_ids.tolist() == packed.input_ids.tolist()
        inputs, labels = (packed.columns[f"decoder_{name}"].tolist() for name in ("input_ids", "labels"))
        assert inputs == [0, *labels[:-1]] and labels[-1] == masked.eos_token_id
        assert (packed.labels == IGNORE_INDEX).all()
    assert (
        corrupt(samples, [Place(9, 4), Place(9, 5), Place(9, 6)])[1].input_ids.tolist()
        != together[1].input_ids.tolist()
    )


def test_a_target_may_begin_with_its_own_last_token() -> None:
    sample = Target(start=None).sample(np.array([5]), np.array([7, 8, 9]))
    assert sample.columns["decoder_input_ids"].tolist() == [9, 7, 8]


def test_too_few_sentinels_are_refused_before_training(masked: Any) -> None:
    config = Span(kind="span", style="ul2")
    assert len(find_sentinels(masked, config.sentinels)) == 30
    SpanCorruption(config, masked, Target(0), seed=0, max_length=180)
    with pytest.raises(ConfigError, match="Texts of 300 tokens need 50 sentinels; there are 30"):
        SpanCorruption(config, masked, Target(0), seed=0, max_length=300)
    with pytest.raises(ConfigError, match="no sentinel"):
        SpanCorruption(Span(kind="span"), make_tokenizer(), Target(0), seed=0, max_length=10)


def test_mode_tokens_name_the_denoiser(masked: Any) -> None:
    modes = {"R": "<extra_id_27>", "X": "<extra_id_28>", "S": "<extra_id_29>"}
    numbers = {masked.convert_tokens_to_ids(token): mode for mode, token in modes.items()}
    config = Span(kind="span", style="ul2", mode_tokens=modes)
    corrupt = SpanCorruption(config, masked, Target(0), seed=0, max_length=100)
    sources = corrupt([as_sample(range(50, 150))] * 700, [Place(0, i) for i in range(700)])
    seen = Counter(numbers[int(sample.input_ids[0])] for sample in sources)
    assert seen["X"] > seen["R"] > seen["S"] > 60  # four, two and one of seven


# Masked language modelling


def test_rates_are_as_configured_and_special_tokens_stay(masked: Any) -> None:
    ids = np.random.default_rng(0).integers(40, 300, 400)
    ids[[0, 7, -1]] = masked.bos_token_id, masked.pad_token_id, masked.eos_token_id
    config = Mlm(kind="mlm", rate=0.2, replace=0.7, random=0.2)
    places = [Place(0, i) for i in range(300)]
    found = Masking(config, masked, seed=0, vocab_size=400)([as_sample(ids)] * 300, places)
    seen, labels = (np.array([getattr(sample, name) for sample in found]) for name in ("input_ids", "labels"))
    chosen = labels != IGNORE_INDEX
    assert not chosen[:, [0, 7, -1]].any()
    assert (seen[~chosen] == np.broadcast_to(ids, seen.shape)[~chosen]).all()
    assert (labels[chosen] == np.broadcast_to(ids, seen.shape)[chosen]).all()
    masks = (seen == masked.mask_token_id)[chosen].mean()
    kept = (seen == ids)[chosen].mean()
    error = 4 * np.sqrt(0.25 / chosen.sum())
    assert abs(chosen[:, 1:-1].mean() - 0.2) < 0.005
    assert abs(masks - 0.7) < error and abs(kept - 0.1) < error


def test_masks_do_not_depend_on_packing_and_differ_between_epochs(masked: Any) -> None:
    corrupt = Masking(Mlm(kind="mlm"), masked, seed=1, vocab_size=400)
    samples = [as_sample(np.arange(n) + 40) for n in (30, 1, 60)]
    places = [Place(2, 8), Place(0, 1), Place(2, 3)]
    for sample, place, packed in zip(samples, places, corrupt(samples, places), strict=True):
        alone = corrupt([sample], [place])[0]
        assert alone.input_ids.tolist() == packed.input_ids.tolist() and alone.labels.tolist() == packed.labels.tolist()
    later = corrupt(samples[2:], [Place(3, 3)])[0]
    assert later.labels.tolist() != corrupt(samples[2:], [Place(2, 3)])[0].labels.tolist()


def test_whole_words_are_hidden_together(masked: Any) -> None:
    ids = np.array(masked("extraordinary people, unfathomably quick; answering hello-world?" * 9)["input_ids"])
    words = WordTable(masked).word_starts(ids).cumsum()
    config = Mlm(kind="mlm", whole_words=True, replace=1, random=0)
    found = Masking(config, masked, seed=0, vocab_size=400)([as_sample(ids)] * 50, [Place(0, i) for i in range(50)])
    chosen = np.array([sample.labels != IGNORE_INDEX for sample in found])
    for word in np.unique(words):
        part = chosen[:, words == word]
        assert (part.all(1) == part.any(1)).all()
    assert 0.1 < chosen.mean() < 0.2 and np.diff(np.flatnonzero(np.diff(words, prepend=0))).max() > 1


def test_a_tokenizer_without_mask_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="no mask token"):
        Masking(Mlm(kind="mlm"), make_tokenizer(), seed=0, vocab_size=400)


# Words from ids


def train(kind: str, corpus: list[str]) -> Any:
    """A tokenizer as T5 or BERT have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"])
    else:
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"])
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


TEXT = 'A naïve fox -- "quick, (brown)" -- jumps over 12 Größen; 東京 is far. Really? (Yes!) No... it\'s 3.5 km'


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "wordpiece"])
def test_words_begin_where_characters_say(kind: str) -> None:
    tokenizer = make_tokenizer() if kind == "byte_level" else train(kind, [TEXT, TEXT.lower()] * 3)
    encoding = tokenizer(TEXT, return_offsets_mapping=True)
    ids, offsets = np.array(encoding["input_ids"]), encoding["offset_mapping"]
    starts = WordTable(tokenizer).word_starts(ids)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    for k, (begin, end) in enumerate(offsets):
        if kind == "wordpiece":
            expected = not pieces[k].startswith("##")
        elif k and begin < offsets[k - 1][1] and pieces[k - 1] != "▁":  # the rest of a character
            expected = False
        else:
            begin += len(TEXT[begin:end]) - len(TEXT[begin:end].lstrip())
            before, first = TEXT[begin - 1 : begin] or " ", TEXT[begin : begin + 1]
            expected = before.isspace() or not (before + first).isalnum()
        assert bool(starts[k]) == expected, (pieces[k], k)


def test_sentences_end_at_full_stops(masked: Any) -> None:
    text = 'One fox. "Two!" Three? four'
    ids = np.array(masked(text)["input_ids"])
    parts = np.split(ids, np.flatnonzero(WordTable(masked).sentence_ends(ids)) + 1)
    joined = [masked.decode(part).strip() for part in parts[:-1]]
    assert "".join(joined).replace(" ", "") == text.replace(" ", "") and joined[0] == "One fox." and len(joined) >= 4


# BART


def hide_slowly(ids: list[int], starts: list[bool], spans: list[tuple[int, int]]) -> list[int]:
    """fairseq's loop over single tokens: each span begins with its mask and removes tokens until it runs out of words.

    Args:
        ids: The text.
        starts: Whether each token begins a word.
        spans: The first token and the number of words of each span.
    """
    seen, kept = list(ids), [True] * len(ids)
    for place, _ in spans:
        seen[place] = MASK
    for place, words in spans:
        while True:
            place += 1
            words -= place == len(ids) or starts[place]
            if words <= 0 or place == len(ids):
                break
            kept[place] = False
    return [token for token, keep in zip(seen, kept, strict=True) if keep]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 50, 300])
def test_infilling_hides_the_words_that_fairseq_hides(size: int) -> None:
    rng = np.random.default_rng(size)
    for i in range(60):
        ids, draw = rng.integers(10, 1000, size), Counters(3, Place(0, i))
        starts = rng.random(size) < (0.6 if i % 2 else 1)
        starts[0] = True
        words = np.flatnonzero(starts)
        budget = math.ceil(len(words) * 0.3)
        lengths = span_lengths(budget, 3.5, draw)
        assert lengths.sum() == budget
        begins = draw.permutation(Purpose.STARTS, len(words))
        spans = zip(words[begins].tolist(), lengths[lengths > 0].tolist(), strict=False)
        expected = hide_slowly(ids.tolist(), starts.tolist(), list(spans))
        out = infill(ids, starts, draw, mask=MASK, rate=0.3, poisson=3.5, random=0.0, vocab_size=1000).tolist()
        assert [token for token in out if token != MASK] == [token for token in expected if token != MASK]
        assert out.count(MASK) == expected.count(MASK) + (lengths == 0).sum()
        if not (lengths == 0).any():
            assert out == expected


def test_lengths_of_spans_follow_the_poisson_distribution() -> None:
    lengths = span_lengths(400_000, 3.5, Counters(0, Place(0, 0)))
    assert abs(lengths.mean() - 3.5) < 0.03 and abs(lengths.var() - 3.5) < 0.06


def test_sentences_are_permuted_whole() -> None:
    ends = np.isin(np.arange(12), (3, 4, 9, 11))
    orders = [sentence_order(ends, Counters(0, Place(0, i))).tolist() for i in range(200)]
    sentences = {(0, 1, 2, 3), (4,), (5, 6, 7, 8, 9), (10, 11)}
    for order in orders:
        rest = order
        while rest:
            found = next(sentence for sentence in sentences if sentence[0] == rest[0])
            assert tuple(rest[: len(found)]) == found
            rest = rest[len(found) :]
    assert len({tuple(order) for order in orders}) == 24


def test_the_target_of_infilling_is_the_whole_text(masked: Any) -> None:
    corrupt = Infilling(Span(kind="span", style="bart"), masked, Target(2), seed=0, vocab_size=400)
    ids = np.array(masked("hello world. how are you today? yes! no.")["input_ids"])
    sample = corrupt([as_sample(ids)], [Place(0, 3)])[0]
    assert sample.columns["decoder_labels"].tolist() == ids.tolist()
    assert (sample.input_ids == masked.mask_token_id).any() and sample.columns["decoder_input_ids"][0] == 2
