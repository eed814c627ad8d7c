"""Encoder-decoders generate what transformers' ``generate`` does, whatever the other prompts of the batch are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from ingle import models
from ingle.config import NoBase
from ingle.errors import ModelError
from ingle.models.loading.layout_choice import enliven
from tests.contract.models.any_model import load
from tests.contract.models.tiny_types import small_encoder_decoder_config

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"w{number} ": number for number in range(128)}, unk_token="w3 "))
)


@pytest.fixture
def sources() -> list[list[int]]:
    ids = torch.randint(3, 100, (50,), generator=torch.Generator().manual_seed(2))
    return [part.tolist() for part in ids.split((5, 21, 9, 1, 14))]


def write(kind: str, folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(small_encoder_decoder_config(kind), dtype=torch.float32)
    enliven(model)
    model.generation_config.forced_eos_token_id = None
    model.generation_config.update(**settings)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, settings", [
    ("t5", {}),  # biases by distance
    ("bart", {"forced_bos_token_id": 9}),  # learned positions
    ("led", {}),  # one document per row
])  # fmt: skip
def test_greedy_answers_are_those_of_transformers(kind: str, settings: dict[str, int], sources, tmp_path: Path) -> None:
    model = load(write(kind, tmp_path, **settings), NoBase())
    reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ends = models.end_token_ids(model, TOKENIZER)
    expected = []
    for source in sources:
        ids = reference.generate(torch.tensor([source]), max_new_tokens=12, num_beams=1, eos_token_id=list(ends))[0]
        answer = ids[1:].tolist()
        expected.append(answer[: next((i for i, token in enumerate(answer) if token in ends), None)])
    answers = models.generate(model, TOKENIZER, sources, max_new_tokens=12, batch_size=3)
    assert [list(answer.token_ids) for answer in answers] == expected
    assert len(set(map(tuple, expected))) > 1
    texts = list(models.stream(model, TOKENIZER, sources[1], max_new_tokens=12))
    assert "".join(texts) == answers[1].text


def test_samples_do_not_depend_on_the_batch_and_stop_at_a_string(sources, tmp_path: Path) -> None:
    model = load(write("t5", tmp_path), NoBase())
    options = {"max_new_tokens": 10, "temperature": 2.0, "seed": 4}
    together = models.generate(model, TOKENIZER, sources, **options)
    for number, source in enumerate(sources):
        assert models.generate(model, TOKENIZER, [source], streams=[number], **options) == [together[number]]
    stop = TOKENIZER.decode([together[1].token_ids[3]])
    stopped = models.generate(model, TOKENIZER, sources, stop=[stop], **options)[1]
    assert stopped.finish_reason == "stop" and together[1].text.startswith(stopped.text)


def test_sources_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    model = load(write("bart", tmp_path), NoBase())
    assert models.generate(model, TOKENIZER, [[5] * 64], max_new_tokens=2)
    with pytest.raises(ModelError, match="longer than the model's context"):
        models.generate(model, TOKENIZER, [[5] * 65], max_new_tokens=2)
