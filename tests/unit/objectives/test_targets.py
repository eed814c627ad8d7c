"""Decoders read their targets in training as transformers shifts labels, and as generation begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from ingle.models.generation.batches import first_token
from ingle.objectives.seq2seq import target_of
from tests.contract.models.tiny_types import ENCODER_DECODER_TYPES, small_encoder_decoder_config

TYPES = [kind for kind in ENCODER_DECODER_TYPES if CONFIG_MAPPING[kind].is_encoder_decoder]
TARGET = [17, 5, 23, 9, 2]


@pytest.mark.parametrize("kind", TYPES)
def test_targets_are_shifted_as_in_transformers(kind: str) -> None:
    config = small_encoder_decoder_config(kind)
    if kind == "encoder-decoder":  # of any two models, so its defaults name no tokens
        config.decoder_start_token_id, config.pad_token_id = 2, 1
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    found = target_of(model)
    sample = found.sample(np.array([4, 5]), np.array(TARGET))
    assert sample.columns["decoder_labels"].tolist() == TARGET
    try:
        expected = model.prepare_decoder_input_ids_from_labels(torch.tensor([TARGET]))[0].tolist()
    except (AttributeError, ValueError):  # no such method, or no start token among its defaults
        expected = [first_token(model), *TARGET[:-1]]
    assert sample.columns["decoder_input_ids"].tolist() == expected
    assert found.start in (None, first_token(model))
