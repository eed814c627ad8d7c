"""Attention over trees against plain attention over every path alone, in float64: outputs and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ingle.kernels.attention import flex, tree_attention
from ingle.kernels.attention import spans as attention_spans
from ingle.kernels.attention.bounds import make_bounds, read_bounds
from ingle.kernels.attention.packed import packed_attention
from ingle.kernels.attention.spans import AttentionSpans, Heads
from ingle.kernels.attention.trees import Trees

#: Lengths of documents, and the document that each one continues.
FORESTS = {
    "pair": ([40, 13, 9], [-1, 0, 0]),
    "group": ([300, 129, 129, 70, 5, 1, 129, 20, 33], [-1, 0, 0, 0, 0, 0, 0, 0, 0]),
    "several": ([20, 5, 6, 7, 30, 150, 20, 8, 200, 10, 10, 140], [-1, 0, 0, -1, -1, 4, 4, -1, -1, 8, 8, 8]),
    "deep": ([50, 20, 7, 9, 130, 12, 3], [-1, 0, 1, 1, 0, 4, -1]),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 25},
    "chunk": {"chunk": 16},
    "window-cap-sinks": {"window": 71, "softcap": 2.0, "sinks": True},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def trees_of(forest: str) -> Trees:
    lengths, parents = FORESTS[forest]
    trees = Trees.of([0, *itertools.accumulate(lengths)], parents)
    assert trees is not None
    return trees


def attend_alone(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, chunk: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One document, [Hq, T, Dh] -> [Hq, T, Dv]."""
    groups, length = len(q) // len(k), q.shape[1]
    scores = q @ k.repeat_interleave(groups, 0).mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    place = torch.arange(length)
    hidden = place[:, None] < place
    hidden |= place[:, None] - place >= (window or length)
    hidden |= place[:, None] // (chunk or length) != place // (chunk or length)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, length, 1)), -1)
    return scores.softmax(-1)[..., :length] @ v.repeat_interleave(groups, 0)


def attend_by_path(forest: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The outputs of a prompt are those in its first path."""
    lengths, parents = FORESTS[forest]
    parts = [torch.arange(sum(lengths)).split(lengths)[d] for d in range(len(lengths))]
    outputs: dict[int, Tensor] = {}
    for leaf in set(range(len(parents))) - set(parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        index = torch.cat([parts[d] for d in path])
        alone = attend_alone(*(t[0, :, index] for t in (q, k, v)), **options)
        for document, part in zip(path, alone.split([lengths[d] for d in path], 1), strict=True):
            outputs.setdefault(document, part)
    return torch.cat([outputs[d] for d in range(len(lengths))], 1).transpose(0, 1)[None]


def make(forest: str, dtype: torch.dtype, hq: int = 4, hkv: int = 2, dh: int = 16, dv: int | None = None) -> Any:
    num_tokens = sum(FORESTS[forest][0])
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(1, num_tokens, heads, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads, size in ((hq, dh), (hkv, dh), (hkv, dv or dh))
    ]
    return leaves, torch.randn(1, num_tokens, hq, dv or dh, generator=generator).to(dtype)


def compare(forest: str, dtype: torch.dtype, case: dict[str, Any], **sizes: int) -> None:
    leaves, grad = make(forest, dtype, **sizes)
    options = {"window": None, "chunk": None, "softcap": None, "sinks": None, **case}
    if options["sinks"]:
        leaves.append(torch.linspace(-2, 4, leaves[0].shape[1]).to(dtype).requires_grad_())
        options["sinks"] = leaves[3]
    out = tree_attention.tree_attention(*leaves[:3], trees_of(forest), scale=0.3, **options)
    ours = (out, *torch.autograd.grad(out, leaves, grad))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = attend_by_path(forest, *exact[:3], **{**options, "sinks": exact[3] if case.get("sinks") else None})
    theirs = (wanted, *torch.autograd.grad(wanted, exact, grad.double()))
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "forest"),
    [
        pytest.param(dtype, forest, marks=() if forest in chosen else pytest.mark.sweep, id=f"{dtype}-{forest}")
        for dtype, chosen in (
            (torch.float64, ["deep"]),
            (torch.float32, ["pair", "several", "deep"]),
            (torch.bfloat16, ["several"]),
        )
        for forest in FORESTS
    ],
)
def test_trees(dtype: torch.dtype, forest: str, case: dict[str, Any]) -> None:
    compare(forest, dtype, case)


@pytest.mark.parametrize("sizes", [{"hq": 1, "hkv": 1}, {"hq": 9, "hkv": 3, "dh": 64}, {"dh": 24, "dv": 16}], ids=str)
def test_head_layouts(sizes: dict[str, int]) -> None:
    compare("several", torch.float32, {}, **sizes)


@pytest.mark.parametrize("forest", ["group", "deep"])
def test_prompts_longer_than_a_block(forest: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(attention_spans, "TILE_KEYS", 64)
    compare(forest, torch.float32, {"window": 91})
    compare(forest, torch.bfloat16, {})


def test_biases_by_distance_are_computed_with_repeated_prompts() -> None:
    trees = trees_of("pair")
    (q, k, v), _ = make("pair", torch.float32)
    bias = torch.randn(4, 2 * 53 - 1, generator=torch.Generator().manual_seed(2))
    out = tree_attention.tree_attention(q, k, v, trees, scale=0.3, bias=bias)
    second = torch.cat((torch.arange(40), torch.arange(53, 62)))
    bounds = torch.tensor([0, 49], dtype=torch.int32)
    alone = packed_attention(*(t[:, :, second] for t in (q, k, v)), bounds, scale=0.3, bias=bias)
    torch.testing.assert_close(out[:, 53:], alone[:, 40:])


def test_documents_without_answers_keep_their_bits() -> None:
    """A document in a row with trees is computed as in a row without."""
    lengths = FORESTS["several"][0]
    trees = trees_of("several")
    bounds = torch.tensor(trees.bounds, dtype=torch.int32)
    leaves, _ = make("several", torch.bfloat16)
    shared = tree_attention.tree_attention(*leaves, trees, scale=0.3)
    packed = packed_attention(*leaves, bounds, scale=0.3)
    root = slice(trees.bounds[8], trees.bounds[8] + lengths[8])  # has its own tiles, since it is long
    assert torch.equal(shared[:, root], packed[:, root])
    assert not torch.equal(shared[:, root.stop :], packed[:, root.stop :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trees_do_not_affect_each_other(dtype: torch.dtype) -> None:
    """Bit for bit, whatever the number of threads; nor does an answer affect another one."""
    trees = trees_of("several")
    leaves, grad = make("several", dtype)

    def run(changed: slice, noise: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        copies = [leaf.detach().clone() for leaf in leaves]
        for each in copies:
            part = each[:, :, changed]
            part += noise * torch.randn(part.shape, generator=generator).to(dtype)
            each.requires_grad_()
        out = tree_attention.tree_attention(*copies, trees, scale=0.3)
        return [out[0], *(g[0].transpose(0, 1) for g in torch.autograd.grad(out, copies, grad))]

    tree = slice(trees.bounds[4], trees.bounds[7])
    for quiet, loud in zip(run(tree, 0.0), run(tree, 9.0), strict=True):
        assert torch.equal(quiet[: tree.start], loud[: tree.start])
        assert torch.equal(quiet[tree.stop :], loud[tree.stop :])
        assert not torch.equal(quiet[tree], loud[tree])
    answer = slice(trees.bounds[5], trees.bounds[6])
    quiet, loud = (run(answer, noise)[0] for noise in (0.0, 9.0))
    assert torch.equal(quiet[: answer.start], loud[: answer.start])
    assert torch.equal(quiet[answer.stop :], loud[answer.stop :])
    many = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(many, 2))
        other = run(tree, 0.0)
    finally:
        torch.set_num_threads(many)
    assert all(torch.equal(a, b) for a, b in zip(other, run(tree, 0.0), strict=True))


class _Shapes(TorchDispatchMode):
    """Collects the shapes of batched products, each of which oneDNN compiles in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen.add((func, *(tuple(t.shape) for t in args)))
        return func(*args, **(kwargs or {}))


def test_answers_need_few_shapes() -> None:
    generator = torch.Generator().manual_seed(2)
    root = 256
    with _Shapes() as shapes:
        for _ in range(4):
            answers = torch.randint(40, 260, (6,), generator=generator).tolist()
            trees = Trees.of([0, *itertools.accumulate([root, *answers])], [-1, *[0] * 6])
            assert trees is not None
            leaves = [torch.randn(1, 2, trees.bounds[-1], 8).bfloat16().requires_grad_() for _ in range(3)]
            tree_attention.tree_attention(*leaves, trees, scale=0.3).sum().backward()
    assert 4 <= len(shapes.seen) <= 60


def test_a_tile_of_several_answers_reads_their_prompt_once() -> None:
    trees = Trees.of([0, 500, *range(520, 661, 20)], [-1, *[0] * 8])
    assert trees is not None
    spans = AttentionSpans.of_trees(trees, Heads(4, 2, 16), window=None)
    answers = [tile for tile in spans.tiles if tile.is_answer]
    assert [tile.rows for tile in answers] == [(500, 620), (620, 660)]
    assert [[(block.level, block.keys) for block in tile.blocks] for tile in answers] == [
        [(1, (0, 500)), (0, (500, 620))],
        [(1, (0, 500)), (0, (620, 660))],
    ]
    assert AttentionSpans.of_trees(trees, Heads(4, 2, 16), window=None) is spans
    windowed = AttentionSpans.of_trees(trees, Heads(4, 2, 16), window=11)
    assert windowed.tiles[-1].blocks[0].keys == (490, 500)  # only what the window reaches


def test_masks_carry_trees() -> None:
    trees = trees_of("deep")
    found = read_bounds(make_bounds(torch.tensor(trees.bounds), parents=trees.parents))
    assert found.trees is not None
    assert (found.trees.bounds, found.trees.parents) == (trees.bounds, trees.parents)
    assert read_bounds(make_bounds(torch.tensor(trees.bounds))).trees is None


@pytest.mark.parametrize("case", [{"window": None}, {"window": 25}, {"window": None, "chunk": 16}], ids=str)
@pytest.mark.parametrize("forest", FORESTS)
def test_flex_attention_computes_the_blocks_that_any_token_sees(forest: str, case: dict[str, Any]) -> None:
    num_tokens = sum(FORESTS[forest][0])
    mask = flex.make_tree_mask(trees_of(forest), torch.device("cpu"), **case)
    eye = torch.eye(num_tokens, dtype=torch.float64)[None, None]  # attention to each key, from its weight
    weights = attend_by_path(forest, eye * 0, eye * 0, eye, **{"chunk": None, "softcap": None, "sinks": None, **case})
    visible = weights[0, :, 0] > 0
    index = torch.arange(num_tokens)
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index[None]), visible)
    size = -(-num_tokens // flex.BLOCK)
    padded = torch.zeros(size * flex.BLOCK, size * flex.BLOCK, dtype=torch.bool)
    padded[:num_tokens, :num_tokens] = visible
    blocks = padded.unflatten(1, (size, -1)).unflatten(0, (size, -1)).transpose(1, 2).flatten(2)
    partial, whole = (
        torch.stack([torch.isin(torch.arange(size), row[:n]) for row, n in zip(rows[0, 0], counts[0, 0], strict=True)])
        for rows, counts in ((mask.kv_indices, mask.kv_num_blocks), (mask.full_kv_indices, mask.full_kv_num_blocks))
    )
    assert torch.equal(partial | whole, blocks.any(-1)) and not (partial & whole).any()
    # A block of keys that a prompt and its first answer fill together counts as partial.
    assert not (whole & ~blocks.all(-1))[:-1].any()
    assert whole.any() == (forest in ("group", "several") and case == {"window": None})


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("forest", FORESTS)
def test_flex_attention(forest: str) -> None:
    leaves, _ = make(forest, torch.float32)
    q, k, v = (leaf.detach() for leaf in leaves)  # torch has no backward of FlexAttention on a CPU
    options: dict[str, Any] = {"window": 91, "chunk": None, "softcap": 2.0, "sinks": torch.linspace(-2, 4, 4)}
    out = flex.attend_trees(q, k, v, trees_of(forest), scale=0.3, **options)
    wanted = attend_by_path(forest, q.double(), k.double(), v.double(), **options)
    assert (out - wanted).norm() <= 3e-6 * wanted.norm()
