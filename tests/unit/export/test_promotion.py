"""Promotion spends bytes where they save most, and never more than there are."""

from __future__ import annotations

import pytest

from ingle.export.fidelity.measurement import TensorFidelity, mean_correlation
from ingle.export.fidelity.promotion import promote, wider_types

_BYTES = {"q4_k": 450, "q5_k": 550, "q6_k": 656, "q8_0": 850}
_SURVIVES = {"q4_k": 0.4, "q5_k": 0.7, "q6_k": 0.95, "q8_0": 0.999}
#: Rms of the change of three weights.
_SIZES = {"large": 1.0, "middle": 0.1, "small": 0.01}


def _measure(name: str, type_name: str) -> TensorFidelity:
    return TensorFidelity(
        name=name,
        type=type_name,
        num_weights=1000,
        delta_rms=_SIZES[name],
        weight_rms=10.0,
        step=1.0,
        codes_changed=0.1,
        correlation=_SURVIVES[type_name],
        gain=1.0,
        num_bytes=_BYTES[type_name],
    )


_NAMES = [(name, "q4_k", 256) for name in _SIZES]


def test_the_weight_that_loses_most_climbs_first() -> None:
    found = promote(_NAMES, _measure, budget_bytes=250, enough=0.999999)
    assert found.types == {"large": "q6_k"}
    assert found.extra_bytes == 206
    assert found.before is not None and found.expected is not None and found.expected > found.before


def test_a_smaller_step_is_taken_where_the_best_cannot_be_paid() -> None:
    found = promote(_NAMES, _measure, budget_bytes=150, enough=0.999999)
    assert found.types == {"large": "q5_k"} and found.extra_bytes == 100


def test_it_ends_when_enough_survives() -> None:
    found = promote(_NAMES, _measure, budget_bytes=10_000, enough=0.9)
    assert set(found.types) == {"large"}


def test_nothing_is_promoted_without_a_budget() -> None:
    found = promote(_NAMES, _measure, budget_bytes=0)
    assert found.types == {} and found.extra_bytes == 0 and found.before == found.expected


def test_no_merged_weights_need_no_promotion() -> None:
    assert promote([], _measure, budget_bytes=100).types == {}


def test_a_row_that_is_no_whole_block_climbs_among_blocks_of_32() -> None:
    assert wider_types("q5_0", 64) == ("q5_1", "q8_0")
    assert wider_types("q4_k", 512) == ("q5_k", "q6_k", "q8_0")
    assert wider_types("q8_0", 512) == ()


def test_correlations_are_weighed_by_the_energy_of_the_change() -> None:
    parts = [_measure("large", "q8_0"), _measure("small", "q4_k")]
    assert mean_correlation(parts) == pytest.approx((0.999 * 1.0 + 0.4 * 1e-4) / (1.0 + 1e-4))
    assert mean_correlation([]) is None
