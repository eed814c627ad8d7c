"""Tests HQQ's storage, and that our solver is better than the published one and near the optimum.

``tests/contract/test_encoders`` compares both solvers with independent implementations.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant.hqq import Hqq, bytes_to_codes, codes_to_bytes
from ingle.quant.plane import as_float16

BITS = (8, 4, 3, 2, 1)
EMBER = Path(__file__).parents[2] / "examples" / "models" / "ember-6m" / "model.safetensors"


def draw(kind: str, rows: int = 64, columns: int = 1024) -> Tensor:
    """Weights of a kind; the real ones are from the bundled model."""
    if kind == "real":
        weight = load_file(EMBER)["model.layers.1.mlp.down_proj.weight"].float()
        return weight[:rows]
    rng = np.random.default_rng(3)
    if kind == "heavy":
        return torch.from_numpy(0.02 * rng.standard_t(3, (rows, columns))).float()
    return torch.from_numpy(rng.normal(0.05 if kind == "shifted" else 0, 0.02, (rows, columns))).float()


def measure(format: Hqq, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Errors of a weight after encoding."""
    planes = format.encode(weight, importance)
    return format.decode(planes, *weight.shape, torch.float32).double() - weight.double()


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "shifted", "real"])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("bits", BITS)
def test_joint_solver_beats_the_published_one(bits: int, size: int, kind: str) -> None:
    weight = draw(kind)
    ours, theirs = (measure(Hqq(bits, size, solver), weight) for solver in ("ingle", "hqq"))
    share = {8: 0.98, 4: 0.96, 3: 0.93, 2: 0.88, 1: 0.8}[bits]
    assert ours.norm() < share * theirs.norm()
    assert ours.abs().pow(0.7).sum() < theirs.abs().pow(0.7).sum()  # what the published one minimises
    assert ours.abs().sum() < theirs.abs().sum()


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "real"])
def test_one_bit_is_better_than_nothing(kind: str) -> None:
    weight = draw(kind)
    assert measure(Hqq(1, 64), weight).norm() < 0.75 * weight.norm()
    if kind == "gaussian":
        assert measure(Hqq(1, 64, "hqq"), weight).norm() > weight.norm()  # as the published one is not


def find_optimum(values: np.ndarray, weights: np.ndarray, bits: int) -> float:
    """The least weighted square error over all scales and zeros, by trying every ascending assignment of codes."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    codes = np.array(list(itertools.combinations_with_replacement(range(2**bits), len(values))), dtype=np.float64)
    total = weights.sum()
    mean, centre = (weights * values).sum() / total, codes @ weights / total
    variance = codes**2 @ weights - total * centre**2
    product = codes @ (weights * values) - total * mean * centre
    explained = np.divide(product**2, variance, out=np.zeros_like(variance), where=variance > 1e-12)
    return float((weights * (values - mean) ** 2).sum() - explained.max())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("bits", "size", "slack"), [(1, 8, 1.005), (1, 32, 1.005), (2, 8, 1.01), (3, 8, 1.02)])
def test_joint_solver_is_near_the_optimum(bits: int, size: int, slack: float, weighted: bool) -> None:
    weight = draw("gaussian", 6, 64)
    importance = torch.from_numpy(np.random.default_rng(4).random(64) ** 2).float() if weighted else None
    weights = torch.ones(64) if importance is None else importance
    reached = float((measure(Hqq(bits, size), weight, importance).square() * weights).sum())
    groups = weight.double().numpy().reshape(-1, size)
    counts = weights.double().expand(6, 64).numpy().reshape(-1, size)
    best = sum(find_optimum(values, count, bits) for values, count in zip(groups, counts, strict=True))
    assert best * 0.999 < reached < slack * best


@pytest.mark.parametrize("bits", BITS)
def test_importance_moves_the_error_to_where_it_counts_less(bits: int) -> None:
    weight = draw("heavy")
    importance = torch.from_numpy(np.random.default_rng(5).lognormal(0, 2, weight.shape[1])).float()
    format = Hqq(bits, 32)
    plain, weighed = (
        float((measure(format, weight, given).square() * importance).sum()) for given in (None, importance)
    )
    assert weighed < 0.95 * plain


def test_columns_without_importance_do_not_count() -> None:
    weight = draw("gaussian", 4, 128)
    importance = torch.ones(128)
    importance[::5] = 0
    changed = weight.clone()
    changed[:, ::5] += 3
    before, after = (Hqq(3, 32).encode(values, importance) for values in (weight, changed))
    assert all(torch.equal(before[plane], after[plane]) for plane in ("scale", "zero"))
    kept = torch.arange(128) % 5 > 0
    codes = [bytes_to_codes(planes["codes"], 3, 128)[:, kept] for planes in (before, after)]
    assert torch.equal(*codes)


def test_importance_has_no_unit() -> None:
    weight, importance = draw("gaussian", 4, 200), torch.rand(200)
    before, after = (Hqq(4, 64).encode(weight, given) for given in (importance, 1024 * importance))
    assert all(torch.equal(before[plane], after[plane]) for plane in before)
    nothing, equal = (Hqq(4, 64).encode(weight, given) for given in (torch.zeros(200), None))
    assert all(torch.equal(nothing[plane], equal[plane]) for plane in nothing)


@pytest.mark.parametrize("importance", [torch.ones(5), -torch.ones(64), torch.full((64,), torch.nan)])
def test_bad_importance_is_refused(importance: Tensor) -> None:
    with pytest.raises(QuantizationError, match="importance of layer"):
        Hqq().encode(torch.randn(2, 64), importance, name="layer")


@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_scales_among_the_smallest_float16_are_searched(bits: int, size: float) -> None:
    """Scales of few digits, and their zeros, are chosen by their error."""
    usual = measure(Hqq(bits, 64), draw("gaussian")).norm() / draw("gaussian").norm()
    weight = draw("gaussian") / 0.02 * size
    assert measure(Hqq(bits, 64), weight).norm() / weight.norm() < max(1.5 * float(usual), 3e-8 / size)


@pytest.mark.parametrize("bits", BITS)
def test_groups_far_from_zero_keep_the_digits_of_float16(bits: int) -> None:
    weight = draw("gaussian") * 1e-3 + 1
    assert measure(Hqq(bits, 64), weight).abs().max() < 2**-11


@pytest.mark.parametrize("solver", ["ingle", "hqq"])
@pytest.mark.parametrize("bits", BITS)
def test_constants_of_float16_are_exact(bits: int, solver: str) -> None:
    values = torch.tensor([0.0, 1.0, -0.25, 0.1, -37.5, 0.0123, -1e-3, 65504.0, 6e-5]).half().float()
    weight = values.unsqueeze(1).expand(-1, 200).contiguous()
    format = Hqq(bits, 64, solver)  # type: ignore[arg-type]
    assert torch.equal(format.decode(format.encode(weight), *weight.shape, torch.float32), weight)


def test_other_constants_are_near() -> None:
    weight = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)).expand(50, 64) - 0.5
    decoded = Hqq().decode(Hqq().encode(weight), 50, 64, torch.float32)
    assert ((decoded - weight).abs() <= 2**-18 * weight.abs()).all()


@pytest.mark.parametrize("solver", ["ingle", "hqq"])
@pytest.mark.parametrize("columns", [37, 3, 200])
@pytest.mark.parametrize("bits", BITS)
def test_a_short_last_group_is_a_group_of_its_size(bits: int, columns: int, solver: str) -> None:
    weight = draw("gaussian", 5, columns)
    format = Hqq(bits, 128, solver)  # type: ignore[arg-type]
    planes = format.encode(weight)
    rest = columns // 128 * 128
    alone = format.encode(weight[:, rest:])
    codes = [
        bytes_to_codes(planes["codes"], bits, columns)[:, rest:],
        bytes_to_codes(alone["codes"], bits, columns - rest),
    ]
    assert torch.equal(*codes)
    assert all(torch.equal(planes[name][:, -2:], alone[name]) for name in ("scale", "zero"))


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("bits", BITS)
def test_any_bytes_decode_as_the_reference(bits: int, size: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 7, 33, 100, 264):
        format = Hqq(bits, size)
        specs = format.plane_specs(5, columns)
        planes = {
            name: torch.randint(256, spec.shape, generator=generator, dtype=torch.uint8) for name, spec in specs.items()
        }
        for name in ("scale", "zero"):  # any finite float16
            planes[name][:, 1::2] &= 0xBB
        for dtype in (torch.float32, torch.bfloat16):
            decoded = format.decode(planes, 5, columns, dtype)
            assert torch.equal(decoded, format.decode_reference(planes, 5, columns, dtype))
        wide = [as_float16(planes[name]).double().repeat_interleave(size, 1)[:, :columns] for name in ("scale", "zero")]
        exact = (bytes_to_codes(planes["codes"], bits, columns).double() - wide[1]) * wide[0]
        assert torch.allclose(format.decode(planes, 5, columns, torch.float32).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_one_little_endian_number(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 29), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    quantized = codes_to_bytes(codes, bits)
    for row, row_bytes in zip(codes.tolist(), quantized.tolist(), strict=True):
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert int.from_bytes(bytes(row_bytes), "little") == number
    assert torch.equal(bytes_to_codes(quantized, bits, 29), codes)


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("bits", BITS)
def test_folding_adds_to_every_weight_of_a_group(bits: int, columns: int) -> None:
    weight = draw("gaussian", 6, columns)
    weight[2] = 0
    weight[3] = 0.3
    format = Hqq(bits, 32)
    planes = format.encode(weight)
    delta = 0.01 * torch.randn(6, -(-columns // 32), generator=torch.Generator().manual_seed(0))
    folded = format.fold(planes, delta)
    assert all(torch.equal(folded[name], planes[name]) for name in ("codes", "scale"))
    wide = delta.repeat_interleave(32, 1)[:, :columns]
    before, after = (format.decode(each, 6, columns, torch.float64) for each in (planes, folded))
    scale, zero = (
        as_float16(folded[name]).double().repeat_interleave(32, 1)[:, :columns] for name in ("scale", "zero")
    )
    assert ((after - before - wide).abs() <= scale * zero.abs() / 2048 + 1e-6).all()
    assert (after - before - wide).norm() < 0.1 * wide.norm()
    assert all(torch.equal(plane, planes[name]) for name, plane in format.fold(planes, 0 * delta).items())


def test_what_cannot_be_folded_is_refused() -> None:
    planes = Hqq(4, 32).encode(draw("gaussian", 4, 64))
    with pytest.raises(QuantizationError, match="shape of the delta"):
        Hqq(4, 32).fold(planes, torch.zeros(4, 3))
    with pytest.raises(QuantizationError, match="too large to fold"):
        Hqq(4, 32).fold(planes, torch.full((4, 2), 1e4))
