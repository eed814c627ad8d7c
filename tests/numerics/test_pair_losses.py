"""Losses of pairs against golden values, start values, limits, invariances and TRL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ingle.objectives.pair_losses import (
    Answers,
    PairOptions,
    judged_loss,
    log_odds,
    pair_loss,
    reward_loss,
    rewards,
    start_value,
)

_F64 = torch.float64


def side(logps: Any, references: Any, lengths: Any, divergence: Any = None, dtype: torch.dtype = _F64) -> Answers:
    logps, references = torch.tensor(logps, dtype=dtype), torch.tensor(references, dtype=dtype)
    kl = None if divergence is None else torch.tensor(divergence, dtype=dtype)
    return Answers(logps, torch.tensor(lengths, dtype=dtype), logps - references, kl)


def two_pairs() -> tuple[Answers, Answers]:
    return side([-10, -25], [-11, -24], [5, 10]), side([-14, -22], [-13.5, -23], [7, 8])


#: The losses of the two pairs, by hand or from the published code.
GOLDENS = {
    PairOptions("sigmoid"): (0.62095705, 0.79813887),
    PairOptions("sigmoid", label_smoothing=0.1): (0.63595705, 0.77813887),
    PairOptions("robust", label_smoothing=0.1): (0.60220705, 0.82313887),
    PairOptions("hinge"): (0.85, 1.2),
    PairOptions("ipo_sum"): (12.25, 49),
    PairOptions("ipo"): (22.35938776, 27.300625),
    PairOptions("exo", label_smoothing=1e-3): (2.50551656, 3.11039702),
    PairOptions("nca"): (1.35082481, 1.43879332),
    PairOptions("bco_pair"): (1.31285631, 1.48879332),
    PairOptions("sppo"): (36.25, 72),
    PairOptions("apo_zero"): (0.96252342, 1.04995837),
    PairOptions("apo_down"): (0.98754934, 1.02485481),
    PairOptions("discopop"): (0.84933758, 0.80575178),
    PairOptions("sigmoid_norm"): (0.67966784, 0.70446046),
    PairOptions("dpop", penalty=50): (0.62095705, -math.log(1 / (1 + math.exp(5.2)))),
    PairOptions("cpo"): (0.51301525, 0.85435524),
    PairOptions("simpo", beta=2, gamma=1): (1.31326169, 0.97407698),
    PairOptions("simpo", beta=2, gamma=1, alpha=0.25): (1.31326169, 0.71134373),
    PairOptions("orpo"): (0.06931472, 0.05674106),
}
#: The loss of a pair with log-ratios of 0.
STARTS = {
    PairOptions("sigmoid"): math.log(2),
    PairOptions("sigmoid", label_smoothing=0.2): math.log(2),
    PairOptions("sigmoid", divergence="js"): math.log(2),
    PairOptions("robust", label_smoothing=0.2): math.log(2),
    PairOptions("hinge"): 1,
    PairOptions("ipo", beta=0.2): 6.25,
    PairOptions("ipo_sum", beta=0.2): 6.25,
    PairOptions("exo", label_smoothing=0.1): -math.log(2) - math.log(0.09) / 2,
    PairOptions("nca"): 2 * math.log(2),
    PairOptions("bco_pair"): 2 * math.log(2),
    PairOptions("sppo", beta=0.2): 12.5,
    PairOptions("apo_zero"): 1,
    PairOptions("apo_down"): 1,
    PairOptions("discopop"): (1 + math.log(2)) / 2,
    PairOptions("sigmoid_norm"): math.log(2),
    PairOptions("dpop", penalty=50): math.log(2),
    PairOptions("tdpo1"): math.log(2),
    PairOptions("tdpo2"): math.log(2),
}
EVERY = list({option.loss: option for option in (*STARTS, *GOLDENS)}.values())
EVERY += [PairOptions("sigmoid", divergence=name) for name in ("forward_kl", "js", "alpha")]
EVERY += [PairOptions("cpo_hinge"), PairOptions("cpo_ipo")]
#: Losses that need not fall when the log-ratio of the chosen answer rises, or when that of the rejected one falls.
_PINNED = {"ipo", "ipo_sum", "cpo_ipo", "sppo", "nca", "apo_down", "exo", "robust"}


def name_of(options: Any) -> str:
    return f"{options.loss} {options.divergence}" if isinstance(options, PairOptions) else ""


@pytest.mark.parametrize(("options", "expected"), GOLDENS.items(), ids=name_of)
def test_golden_values(options: PairOptions, expected: tuple[float, float]) -> None:
    torch.testing.assert_close(pair_loss(*two_pairs(), options), torch.tensor(expected, dtype=_F64), rtol=0, atol=6e-9)


def test_golden_values_of_single_answers_and_scores() -> None:
    ratios, is_good = torch.tensor([1.0, -0.5], dtype=_F64), torch.tensor([True, False])
    half = torch.full((2,), 0.5, dtype=_F64)
    expected = torch.tensor([0.48750260, 0.47502081], dtype=_F64)
    torch.testing.assert_close(judged_loss(ratios, is_good, half, 0.1, "kto"), expected, rtol=0, atol=6e-9)
    split = torch.tensor([0.1, -0.05], dtype=_F64)
    expected = torch.tensor([-math.log(1 / (1 + math.exp(0.4))), -math.log(1 / (1 + math.exp(-0.55)))], dtype=_F64)
    torch.testing.assert_close(judged_loss(ratios, is_good, half, 0.1, "bco"), expected)
    expected = torch.sigmoid(split * torch.tensor([-1, 1], dtype=_F64))
    torch.testing.assert_close(judged_loss(ratios, is_good, half, 0.1, "apo_zero"), expected)
    chosen, rejected = torch.tensor([1.2, -0.3], dtype=_F64), torch.tensor([0.4, 0.1], dtype=_F64)
    for margin, values in ((0.0, (0.37110067, 0.91301525)), (0.5, (0.55435524, None))):
        found = reward_loss(chosen, rejected, torch.tensor([margin, 0], dtype=_F64)).tolist()
        assert found[0] == pytest.approx(values[0], abs=6e-9) and found[1] == pytest.approx(0.91301525, abs=6e-9)


@pytest.mark.parametrize(("options", "expected"), STARTS.items(), ids=name_of)
def test_every_loss_with_a_reference_starts_at_its_known_value(options: PairOptions, expected: float) -> None:
    assert start_value(options) == pytest.approx(expected, rel=1e-12)


def _gradients(options: PairOptions, c: float, r: float) -> tuple[float, float]:
    values = torch.tensor([c, r], dtype=_F64, requires_grad=True)
    one, kl = torch.ones(1, dtype=_F64), torch.zeros(1, dtype=_F64)
    sides = [Answers(values[i : i + 1] - 20, one * 8, values[i : i + 1], kl) for i in (0, 1)]
    (gradient,) = torch.autograd.grad(pair_loss(sides[0], sides[1], options).sum(), values)
    return float(gradient[0]), float(gradient[1])


@pytest.mark.parametrize("options", EVERY, ids=name_of)
@pytest.mark.parametrize(("c", "r"), [(0.0, 0.0), (1.0, -2.0), (-1.5, 0.5), (-3.0, -2.0)])
def test_losses_prefer_the_chosen_answer(options: PairOptions, c: float, r: float) -> None:
    of_chosen, of_rejected = _gradients(options, c, r)
    if options.loss == "discopop" or (options.loss in _PINNED and (c, r) != (0.0, 0.0)):
        return  # discopop rises between two valleys
    assert of_chosen <= 0 <= of_rejected and of_rejected - of_chosen > 0


def test_apo_down_and_nca_push_a_chosen_answer_down() -> None:
    # apo_down teaches from answers that are worse than the model's own; nca holds the likelihood of each answer.
    assert _gradients(PairOptions("apo_down"), 3.0, -40.0)[0] > 0
    assert _gradients(PairOptions("nca", beta=1.0), 3.0, 0.0)[0] > 0


@pytest.mark.parametrize("options", EVERY, ids=name_of)
def test_gradients_are_those_of_the_loss(options: PairOptions) -> None:
    values = torch.tensor([0.7, -1.1, -0.4, 0.9], dtype=_F64, requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        lengths, kl = torch.tensor([5.0, 9.0], dtype=_F64), torch.tensor([0.3, 0.2], dtype=_F64)
        sides = [Answers(part - 12, lengths, part, kl + part**2) for part in (values[:2], values[2:])]
        return pair_loss(sides[0], sides[1], options)

    if options.loss != "tdpo2":  # one divergence is a constant
        assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("options", EVERY, ids=name_of)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_log_ratios_stay_finite_in_float32(options: PairOptions, size: float) -> None:
    for c, r in ((size, -size), (size, size), (size, 0.0), (0.0, size)):
        values = torch.tensor([c, r], requires_grad=True)
        one = torch.ones(1)
        sides = [Answers(values[i : i + 1] - 1e4, one * 4, values[i : i + 1], one * 0) for i in (0, 1)]
        loss = pair_loss(sides[0], sides[1], options).sum()
        loss.backward()
        assert loss.isfinite() and values.grad is not None and values.grad.isfinite().all(), (c, r)


@pytest.mark.parametrize("options", EVERY, ids=name_of)
def test_beta_near_0_ignores_the_answers(options: PairOptions) -> None:
    if "ipo" in options.loss or options.loss in ("sppo", "orpo"):  # 1 / beta, or a weight
        return
    near = replace(options, beta=1e-12)
    chosen, rejected = side([-10, -25], [-11, -24], [5, 10], [1, 2]), side([-14, -22], [-13.5, -23], [7, 8], [3, 1])
    same = pair_loss(rejected, rejected, near)
    torch.testing.assert_close(pair_loss(chosen, rejected, near), same, rtol=0, atol=1e-8)


def test_constants_on_both_sides_cancel_where_the_reference_shifts_with_them() -> None:
    chosen, rejected = two_pairs()
    shifted = [replace(each, logps=each.logps + 7) for each in (chosen, rejected)]
    for options in EVERY:
        if start_value(options) is not None and not options.loss.startswith("tdpo"):
            assert torch.equal(pair_loss(shifted[0], shifted[1], options), pair_loss(chosen, rejected, options))


def test_swapping_a_pair_exchanges_the_terms_of_the_smoothed_loss() -> None:
    chosen, rejected = two_pairs()
    delta = 0.1 * (chosen.log_ratios - rejected.log_ratios)
    difference = pair_loss(rejected, chosen, PairOptions("sigmoid")) - pair_loss(
        chosen, rejected, PairOptions("sigmoid")
    )
    torch.testing.assert_close(difference, delta)
    half = PairOptions("sigmoid", label_smoothing=0.4999999999)
    torch.testing.assert_close(pair_loss(rejected, chosen, half), pair_loss(chosen, rejected, half))


def test_tdpo_compares_the_divergences() -> None:
    chosen, rejected = side([-10], [-11], [5], [0.5]), side([-14], [-13.5], [7], [2.5])
    found = float(pair_loss(chosen, rejected, PairOptions("tdpo1")))
    assert found == pytest.approx(math.log1p(math.exp(-0.1 * (1.5 - 2.0))))
    found = float(pair_loss(chosen, rejected, PairOptions("tdpo2", kl_weight=0.5)))
    assert found == pytest.approx(math.log1p(math.exp(-0.1 * (1.5 - 0.5 * 2.0))))


@pytest.mark.parametrize("loss", ["simpo", "orpo", "ipo", "sigmoid_norm"])
def test_an_answer_without_tokens_is_finite(loss: Any) -> None:
    empty = side([0.0], [0.0], [0])
    assert pair_loss(empty, empty, PairOptions(loss)).isfinite().all()


def test_odds_of_certain_and_of_impossible_answers() -> None:
    for dtype, tolerance in ((_F64, 1e-12), (torch.float32, 2e-6)):
        logps = torch.tensor([-1e-6, -0.1, -0.69, -0.7, -5.0, -80.0], dtype=dtype)
        exact = torch.log(torch.special.expm1(-logps.double())).neg()
        torch.testing.assert_close(
            log_odds(logps).double(), exact, rtol=tolerance, atol=1e-7 if dtype == torch.float32 else 0
        )
    certain = torch.zeros(1, requires_grad=True)
    log_odds(certain).sum().backward()
    assert certain.grad is not None and certain.grad.isfinite().all() and log_odds(certain).isfinite().all()


def test_rewards_are_scaled_log_ratios() -> None:
    chosen, rejected = two_pairs()
    for options in EVERY:
        if options.divergence == "reverse_kl" and options.label_smoothing == 0 and options.loss in ("sigmoid", "cpo"):
            margin = rewards(chosen, options) - rewards(rejected, options)
            torch.testing.assert_close(torch.log1p(torch.exp(-margin)), pair_loss(chosen, rejected, options))
        if options.loss in ("ipo", "sigmoid_norm"):  # which compare means, but a reward is that of the whole answer
            torch.testing.assert_close(rewards(chosen, options), options.beta * chosen.log_ratios)
