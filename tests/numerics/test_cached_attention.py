"""Attention over stored keys against attention over the complete texts, and its independence of everything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ingle.kernels.attention.cached import KeyStore, Places
from ingle.kernels.attention.cpu import Scores
from ingle.kernels.attention.packed import attend_by_document
from ingle.kernels.attention.tree_attention import cut_bounds

PROMPT, LENGTHS = 70, (3, 40, 1)


def texts(dtype, q_heads, kv_heads, size, value_size):
    """Three answers to one prompt: queries, keys and values of each whole text."""
    generator = torch.Generator().manual_seed(q_heads + size)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    shared = [
        normal(1, heads, PROMPT, width) for heads, width in ((q_heads, size), (kv_heads, size), (kv_heads, value_size))
    ]
    return [
        [torch.cat((part, normal(1, part.shape[1], length, part.shape[3])), 2) for part in shared] for length in LENGTHS
    ]


def through_store(answers, order, scores, **options):
    """The results of the answers' tokens, each in a pass with the next tokens of the others in another order."""
    store = KeyStore(PROMPT + 5 + 40 * len(answers))
    q, k, v = (part[0].transpose(0, 1)[:PROMPT] for part in answers[0])
    rows = torch.arange(5, PROMPT + 5)
    whole = np.array([[5, PROMPT, 0, position] for position in range(PROMPT)])
    store.begin(Places(rows, whole))
    store.attend(q, k, v, scores, **options)
    results = [[] for _ in answers]
    for step in range(max(LENGTHS)):
        growing = [index for index in order if step < LENGTHS[index]]
        own = [PROMPT + 5 + 40 * order.index(index) for index in growing]
        store.begin(
            Places(
                torch.tensor([start + step for start in own]),
                np.array([[5, PROMPT, start, PROMPT + step] for start in own]),
            )
        )
        q, k, v = (torch.stack([answers[index][part][0, :, PROMPT + step] for index in growing]) for part in range(3))
        out = store.attend(q, k, v, scores, **options)
        for index, row in zip(growing, out, strict=True):
            results[index].append(row)
    return [torch.stack(rows) for rows in results]


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2, 16, 16), {}),
        ((4, 4, 24, 8), {"window": 20}),
        ((2, 1, 8, 8), {"softcap": 3.0, "sinks": True}),
        ((6, 2, 16, 16), {"chunk": 32}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_token_sees_its_prompt_and_its_own_answer(heads, options, dtype) -> None:
    answers = texts(dtype, *heads)
    sinks = torch.linspace(-1, 2, heads[0]).to(dtype) if options.get("sinks") else None
    window, chunk, scale = options.get("window"), options.get("chunk"), heads[2] ** -0.5
    scores = Scores(scale, options.get("softcap", 0.0))
    settings = {"before": None if window is None else window - 1, "chunk": chunk, "sinks": sinks}
    found = through_store(answers, [0, 1, 2], scores, **settings)
    for (q, k, v), length, result in zip(answers, LENGTHS, found, strict=True):
        bounds = torch.tensor([0, PROMPT + length])
        if chunk is not None:
            bounds = cut_bounds(bounds, chunk, PROMPT + length)
        more = {"scale": scale, "causal": True, "window": window, "softcap": options.get("softcap")}
        wide = (part.double() for part in (q, k, v))
        exact = attend_by_document(*wide, bounds, **more, sinks=None if sinks is None else sinks.double())[0, PROMPT:]
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)
    for one, other in zip(found, through_store(answers, [2, 0, 1], scores, **settings), strict=True):
        assert torch.equal(one, other), "a result depends on the place of the token"
