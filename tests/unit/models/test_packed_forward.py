"""Costs of packed documents that results do not show: masks, padding of heads, chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from ingle.data.batch import collate
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.models import ModelTask, forward_task
from ingle.models.forward.attention import attend
from ingle.models.forward.hidden_states import forward_packed
from ingle.models.forward.layout import boundaries_of, layout_of
from ingle.models.forward.rotary_by_length import document_lengths
from ingle.models.loading.layout_choice import choose_layout, enliven
from ingle.models.loading.meta_device import build
from ingle.models.text_part import padding_id

_TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}


def make_model(config: Any, task: ModelTask | None = None) -> Any:
    """A model with random weights, ready for packed documents."""
    layout = choose_layout(config).layout
    assert layout is not None
    model = build(config, torch.float32, layout=layout, task=task or ModelTask()).to_empty(device="cpu")
    model.initialize_weights()
    enliven(model)
    return model.eval()


def test_dealt_layers_share_their_masks() -> None:
    model = make_model(transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=2, vocab_size=64))
    boundaries, seen = boundaries_of(model), []
    assert layout_of(model).kind == "documents" and boundaries is not None
    last = model.transformer.h[-1]
    last.register_forward_hook(lambda *_: seen.append(boundaries.current))
    cu_seqlens = torch.tensor([0, 20, 25, 45], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in (20, 5, 20)])
    with torch.no_grad():
        forward_packed(model, torch.arange(45)[None], positions[None], cu_seqlens)
    (documents,) = seen
    assert [len(group.masks) for group in documents.groups] == [1] * len(documents.groups)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_long_document_does_not_pad_the_head_of_short_ones(kind: str) -> None:
    task = ModelTask("classify", ("a", "b", "c"), "single_label_classification")
    configs: Any = {"llama": transformers.LlamaConfig, "bert": transformers.BertConfig}
    config = configs[kind](**_TINY, intermediate_size=64, pad_token_id=0)
    model = make_model(config, task)
    lengths, rng = (4, 150, *[3, 5] * 20), np.random.default_rng(0)
    documents = [rng.integers(3, 60, length).astype(np.int32) for length in lengths]
    samples = [Sample(ids, np.full(len(ids), IGNORE_INDEX, np.int32), {}) for ids in documents]
    places: list[int] = []
    base = model.model if kind == "llama" else model.bert
    base.register_forward_hook(lambda _, __, output: places.append(output.last_hidden_state[..., 0].numel()))
    with torch.no_grad():
        packed = forward_task(model, collate(samples))
        num_places = sum(places)
        alone = [model(torch.from_numpy(ids).long()[None]).logits[0] for ids in documents]
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert num_places <= 2 * sum(lengths)  # all in one batch: 42 x 150


@pytest.mark.parametrize("longest", [11, None])
def test_chunks_end_with_their_documents(longest: int | None) -> None:
    config = SimpleNamespace(layer_types=["chunked_attention"], attention_chunk_size=4)
    layer = nn.Module()
    layer.config, layer.layer_idx, layer.is_causal = config, 0, True
    q, k, v = torch.randn(3, 1, 2, 18, 8, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 3, 14, 18], dtype=torch.int32)
    actual, _ = attend(layer, q, k, v, None, cu_seq_lens_q=cu_seqlens, max_length_q=longest)
    chunks = torch.tensor([0, 0, 0, *[1] * 4, *[2] * 4, *[3] * 3, *[4] * 4])
    mask = (chunks[:, None] == chunks) & torch.ones(18, 18, dtype=torch.bool).tril()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_configs_without_padding_token() -> None:
    assert padding_id(transformers.LlamaConfig(**_TINY, pad_token_id=-1)) == 0
    assert padding_id(transformers.LlamaConfig(**_TINY, pad_token_id=None)) == 0
    assert padding_id(transformers.LlamaConfig(**_TINY, pad_token_id=7)) == 7


def test_documents_begin_where_positions_do() -> None:
    """Positions begin at 0, or behind the keys of an adapter; a document may have one token."""
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [4, 5, 6, 4, 4, 5]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2], [7, 7, 7, 5, 6, 6]]
