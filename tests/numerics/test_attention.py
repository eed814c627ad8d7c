"""``packed_attention`` against plain attention in float64, one document at a time: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ingle.kernels.attention import flex, packed
from ingle.kernels.attention import spans as attention_spans
from ingle.kernels.attention.packed import packed_attention

LENGTHS = {
    "one": [37],
    "equal": [16, 16, 16],
    "mixed": [1, 5, 33, 1, 8, 70, 2],
    "ones": [1] * 20,
    "tiny": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 4,
    "long": [300, 3],
}
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


Window = int | tuple[int, int] | None


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, causal: bool, window: Window,
    softcap: float | None, sinks: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    before, after = window if isinstance(window, tuple) else ((window or 10**9) - 1,) * 2
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outputs = []
    for part in torch.arange(sum(lengths)).split(lengths):
        scores = (q[0, :, part] @ k[0, :, part].transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = part[:, None] - part[None, :]
        hidden = (distance > before) | (-distance > after)
        if causal:
            hidden |= distance < 0
        if bias is not None:
            scores = scores + bias[:, bias.shape[1] // 2 - distance]
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:  # one more key, whose value is zero
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(part), 1)), -1)
        outputs.append(scores.softmax(-1)[..., : len(part)] @ v[0, :, part])
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def compare(
    dtype: torch.dtype, lengths: list[int], *, hq: int = 4, hkv: int = 2, dh: int = 16, dv: int | None = None,
    causal: bool = True, window: Window = None, softcap: float | None = None, scale: float = 0.3,
    has_sinks: bool = False, has_bias: bool = False,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    n = sum(lengths)
    # As projections make them: [1, N, H, Dh] seen as [1, H, N, Dh].
    q, k, v = (
        torch.randn(1, n, h, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for h, size in ((hq, dh), (hkv, dh), (hkv, dv or dh))
    )
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    leaves = [q, k, v]
    sinks = torch.linspace(-2, 4, hq).to(dtype).requires_grad_() if has_sinks else None
    distances = 2 * max(lengths) + 3  # those beyond the longest document are not used
    bias = torch.randn(hq, distances, generator=generator).to(dtype).requires_grad_() if has_bias else None
    leaves += [leaf for leaf in (sinks, bias) if leaf is not None]
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    out = packed_attention(q, k, v, cu_seqlens, **options, sinks=sinks, bias=bias)
    assert out.shape == (1, n, hq, dv or dh) and out.dtype == dtype
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    more = dict(
        zip([name for name, leaf in (("sinks", sinks), ("bias", bias)) if leaf is not None], exact[3:], strict=True)
    )
    expected = reference(*exact[:3], lengths, **options, **more)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for actual, wanted in zip((out, *ours), (expected, *theirs), strict=True):
        # A query with one key has no gradient: errors are then measured against the output.
        assert (actual.double() - wanted).norm() <= DTYPES[dtype] * max(wanted.norm(), expected.norm() / 4)
        assert (actual.double() - wanted).abs().max() <= 6 * DTYPES[dtype] * max(wanted.abs().max(), 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_causal_with_grouped_heads(dtype: torch.dtype, lengths: list[int]) -> None:
    compare(dtype, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, softcap", [(None, None), (4, None), (None, 2.0), (7, 2.0), (1, None)])
def test_windows_caps_and_both_directions(
    dtype: torch.dtype, causal: bool, window: int | None, softcap: float | None
) -> None:
    compare(dtype, LENGTHS["mixed"], causal=causal, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, window, softcap", [(True, None, None), (True, 7, None), (False, None, 2.0)])
def test_sinks(dtype: torch.dtype, causal: bool, window: int | None, softcap: float | None) -> None:
    compare(dtype, LENGTHS["mixed"], causal=causal, window=window, softcap=softcap, has_sinks=True)


def test_the_documents_of_other_devices_have_sinks_caps_and_biases(monkeypatch: Any) -> None:
    monkeypatch.setattr(packed, "supported", lambda *tensors: False)
    compare(torch.float32, LENGTHS["mixed"], has_sinks=True)
    compare(torch.float32, LENGTHS["mixed"], causal=False, window=(3, 5), has_bias=True)
    compare(torch.float32, LENGTHS["mixed"], window=7, softcap=2.0, has_sinks=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_flex_attention_computes_the_blocks_that_any_token_sees(causal: bool, window: int | None) -> None:
    lengths = [1, 130, 300, 2, 515]
    num_tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    mask = flex.make_mask(cu_seqlens, num_tokens, causal=causal, window=window)
    index = torch.arange(num_tokens)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = index[:, None] - index
    visible = (document[:, None] == document) & (distance.abs() < (window or num_tokens))
    visible &= (distance >= 0) if causal else True
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index[None]), visible)
    padded = torch.zeros(8 * flex.BLOCK, 8 * flex.BLOCK, dtype=torch.bool)
    padded[:num_tokens, :num_tokens] = visible
    tiles = padded.unflatten(1, (8, -1)).unflatten(0, (8, -1)).transpose(1, 2).flatten(2)
    partial, whole = (
        torch.stack(
            [torch.isin(torch.arange(8), row[:count]) for row, count in zip(rows[0, 0], counts[0, 0], strict=True)]
        )
        for rows, counts in ((mask.kv_indices, mask.kv_num_blocks), (mask.full_kv_indices, mask.full_kv_num_blocks))
    )
    assert torch.equal(partial | whole, tiles.any(-1)) and not (partial & whole).any()
    padded[num_tokens:], padded[:, num_tokens:] = True, True  # beyond the last token nothing is computed
    tiles = padded.unflatten(1, (8, -1)).unflatten(0, (8, -1)).transpose(1, 2).flatten(2)
    assert torch.equal(whole, tiles.all(-1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal, window", [(True, None), (True, 9), (False, None)])
@pytest.mark.parametrize("softcap, has_sinks", [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_flex_attention(causal: bool, window: int | None, softcap: float | None, has_sinks: bool) -> None:
    """Without a compiler torch computes all scores, by the same functions and mask."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 130, 1, 64]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (torch.randn(1, heads, 200, 16, generator=generator) for heads in (4, 2, 2))
    sinks = torch.linspace(-2, 4, 4) if has_sinks else None
    options: dict[str, Any] = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}
    out = flex.attend_flex(q, k, v, cu_seqlens, **options, sinks=sinks)
    wanted = reference(q.double(), k.double(), v.double(), lengths, *options.values(), sinks)
    assert (out - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, window", [(True, None), (True, 90), (False, None), (False, 50)])
def test_documents_longer_than_a_tile(dtype: torch.dtype, causal: bool, window: int | None, monkeypatch: Any) -> None:
    """Blocks of keys are merged, even if a row sees no key of one."""
    monkeypatch.setattr(attention_spans, "TILE_KEYS", 64)
    compare(dtype, [333, 20, 200], causal=causal, window=window)


@pytest.mark.parametrize("hq, hkv, dh", [(1, 1, 8), (6, 6, 20), (8, 1, 64), (9, 3, 80)])
def test_head_layouts(hq: int, hkv: int, dh: int) -> None:
    compare(torch.bfloat16, LENGTHS["mixed"], hq=hq, hkv=hkv, dh=dh, scale=dh**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (False, (3, 12)), (True, 7)])
def test_biases_by_distance(dtype: torch.dtype, causal: bool, window: Window) -> None:
    compare(dtype, LENGTHS["mixed"], causal=causal, window=window, has_bias=True)
    compare(dtype, [1, 1], causal=causal, window=window, has_bias=True, has_sinks=True)


def test_biases_over_several_tiles(monkeypatch: Any) -> None:
    monkeypatch.setattr(attention_spans, "TILE_KEYS", 64)
    compare(torch.float32, [333, 20, 200], causal=False, has_bias=True, has_sinks=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_cross_attention(dtype: torch.dtype, compiled: bool, monkeypatch: Any) -> None:
    """The queries of each document see all keys of the document with the same number in another row."""
    if not compiled:
        monkeypatch.setattr(packed, "supported", lambda *tensors: False)
    monkeypatch.setattr(attention_spans, "TILE_KEYS", 64)
    lengths, lengths_k = [3, 1, 140, 5, 5, 20], [9, 150, 7, 1, 30, 4]
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(1, heads, sum(sizes), 16, generator=generator).to(dtype).requires_grad_()
        for heads, sizes in ((4, lengths), (2, lengths_k), (2, lengths_k))
    ]
    bounds, bounds_k = (torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in (lengths, lengths_k))
    out = packed_attention(*leaves, bounds, scale=0.3, causal=False, cu_seqlens_k=bounds_k)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    queries, keys, values = (
        leaf[0].split(sizes, 1) for leaf, sizes in zip(exact, (lengths, lengths_k, lengths_k), strict=True)
    )
    wanted = torch.cat(
        [
            (q @ k.repeat_interleave(2, 0).mT * 0.3).softmax(-1) @ v.repeat_interleave(2, 0)
            for q, k, v in zip(queries, keys, values, strict=True)
        ],
        1,
    ).transpose(0, 1)[None]
    ours = (out, *torch.autograd.grad(out, leaves, grad))
    theirs = (wanted, *torch.autograd.grad(wanted, exact, grad.double()))
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual.double() - expected).norm() <= DTYPES[dtype] * expected.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_adds_biases_and_crosses_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths, lengths_k = [5, 130, 1, 64], [140, 3, 70, 9]
    bounds, bounds_k = (torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in (lengths, lengths_k))
    q, k, v = (torch.randn(1, heads, 200, 16, generator=generator) for heads in (4, 2, 2))
    bias = torch.randn(4, 2 * 130 - 1, generator=generator)
    options: dict[str, Any] = {"scale": 0.3, "causal": False, "window": (9, 4), "softcap": None, "sinks": None}
    out = flex.attend_flex(q, k, v, bounds, **options, bias=bias)
    wanted = reference(q.double(), k.double(), v.double(), lengths, **options, bias=bias.double())
    assert (out - wanted).norm() <= 3e-6 * wanted.norm()
    k, v = (torch.randn(1, 2, sum(lengths_k), 16, generator=generator) for _ in range(2))
    crossed = flex.attend_flex(q, k, v, bounds, **options, cu_seqlens_k=bounds_k)
    by_document = packed.attend_by_document(q, k, v, bounds, **options, cu_seqlens_k=bounds_k)
    assert (crossed - by_document).norm() <= 3e-6 * by_document.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dh, dv", [(24, 16), (16, 32)])
def test_values_of_a_different_size_than_keys(dtype: torch.dtype, dh: int, dv: int) -> None:
    compare(dtype, LENGTHS["mixed"], dh=dh, dv=dv, window=7)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "biased", "cross"])
def test_documents_do_not_affect_each_other(kind: str) -> None:
    """Bit for bit: the content of another document changes nothing, forward or backward."""
    lengths = torch.tensor([5, 40, 200, 7])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    q, k, v, grad = (torch.randn(1, 2, 252, 8).bfloat16() for _ in range(4))
    options: dict[str, Any] = {"causal": kind == "causal"}
    if kind == "biased":
        options["bias"] = torch.randn(2, 399).bfloat16()
    if kind == "cross":
        options["cu_seqlens_k"] = bounds

    def run(noise: float) -> list[Tensor]:
        leaves = [t.clone() for t in (q, k, v)]
        for leaf in leaves:
            leaf[:, :, 45:245] += noise * torch.randn(1, 2, 200, 8).bfloat16()
        for leaf in leaves:
            leaf.requires_grad_()
        out = packed_attention(*leaves, bounds, scale=0.3, **options)
        return [out[0], *(g[0].transpose(0, 1) for g in torch.autograd.grad(out, leaves, grad.transpose(1, 2)))]

    for quiet, loud in zip(run(0.0), run(9.0), strict=True):
        assert torch.equal(quiet[:45], loud[:45]) and torch.equal(quiet[245:], loud[245:])
        assert not torch.equal(quiet[45:245], loud[45:245])


class _Shapes(TorchDispatchMode):
    """Collects the shapes of batched products, each of which oneDNN compiles in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen.add((func, *((tuple(t.shape), t.stride()) for t in args)))
        return func(*args, **(kwargs or {}))


def test_ragged_documents_need_few_shapes() -> None:
    """The shapes fit into oneDNN's cache (:mod:`ingle.parallel.mesh`), also if every step has other lengths."""
    generator = torch.Generator().manual_seed(2)
    with _Shapes() as shapes:
        for _ in range(4):
            bounds = torch.randint(2, 400, (20,), generator=generator).cumsum(0).sub(2).to(torch.int32)
            bounds[0] = 0
            leaves = [torch.randn(1, 2, int(bounds[-1]), 8).bfloat16().requires_grad_() for _ in range(3)]
            packed_attention(*leaves, bounds, scale=0.3, causal=False).sum().backward()
    assert 4 <= len(shapes.seen) <= 100
