"""Tables by objective cover every kind, and published values fit the options that they fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from ingle.config.evaluate import METRICS_OF, suitable_metrics
from ingle.config.objective import (
    FAMILY,
    TRAINS,
    ObjectiveConfig,
    ObjectiveKind,
    Sft,
    reads_answers,
    samples_answers,
)
from ingle.config.policy import Grpo, Reinforce
from ingle.config.policy_presets import POLICY_PRESETS, describe_policy, policy_preset, suit_policy
from ingle.config.preferences import Dpo, DpoLoss
from ingle.config.presets import PRESETS, describe_difference, describe_preset, preset_of, suit_preferences
from ingle.config.run import Run
from ingle.inference import NOT_TEXT
from ingle.models import model_task
from ingle.report import run_page

KINDS: tuple[ObjectiveKind, ...] = get_args(ObjectiveKind)
SAMPLED = tuple(kind for kind in KINDS if samples_answers(kind))
#: Options that have no default.
REQUIRED: dict[str, dict[str, Any]] = {
    **{kind: {"rewards": ["reward.py"]} for kind in SAMPLED},
    "distill": {"teacher": "teacher"},
}
ANSWERS = tuple(kind for kind in KINDS if reads_answers(kind))


def section(kind: str, **options: Any) -> Any:
    return TypeAdapter(ObjectiveConfig).validate_python({"kind": kind, **REQUIRED.get(kind, {}), **options})


@pytest.mark.parametrize(
    "table", [TRAINS, FAMILY, METRICS_OF, run_page._UNITS], ids=["models", "family", "metrics", "units"]
)
def test_tables_cover_every_objective(table: Mapping[ObjectiveKind, Any]) -> None:
    assert set(table) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_a_head_generate_no_text(kind: ObjectiveKind) -> None:
    options = {"classify": {"problem": "single"}}.get(kind, {})
    has_head = model_task(section(kind, **options)).kind != "lm"
    assert has_head == (kind in NOT_TEXT and kind != "mlm")
    assert set(suitable_metrics(section(kind, **options))) <= METRICS_OF[kind]


@pytest.mark.parametrize("kind", ANSWERS)
def test_published_values_fill_every_option_that_is_null(kind: ObjectiveKind) -> None:
    sections = [section(kind, loss=loss) for loss in get_args(DpoLoss)] if kind == "dpo" else [section(kind)]
    for given in sections:
        published = preset_of(given).options
        suited = suit_preferences(given)
        assert type(given).model_validate(suited.model_dump()) == suited  # within the bounds of the options
        assert {name: getattr(suited, name) for name in published} == published
        assert all(getattr(given, name) is None for name in published)  # otherwise the default would win


def test_every_published_value_belongs_to_an_objective() -> None:
    assert set(PRESETS) == {*get_args(DpoLoss), *ANSWERS} - {"dpo"}


def test_own_values_stay_and_are_named() -> None:
    simpo = section("simpo", gamma=0.5)
    assert (suit_preferences(simpo).beta, suit_preferences(simpo).gamma) == (2.0, 0.5)
    assert describe_preset(simpo) == (
        "SimPO as published (Meng et al. 2024, arXiv 2405.14734): beta 2, gamma 1. This run differs: gamma 0.5."
    )
    assert describe_difference(simpo) == describe_preset(simpo)
    assert describe_difference(Dpo(kind="dpo")) is None and describe_difference(Sft()) is None
    assert "differs" not in (describe_preset(Dpo(kind="dpo")) or "")


def sampled_sections() -> list[Any]:
    named = [("grpo", name) for name in get_args(get_args(Grpo.model_fields["preset"].annotation)[0])]
    named += [("reinforce", name) for name in get_args(get_args(Reinforce.model_fields["preset"].annotation)[0])]
    plain = [section(kind) for kind in SAMPLED]
    return [*plain, *(section(kind, preset=name) for kind, name in named)]


def test_published_values_of_policies_fill_their_options_and_give_way_to_own_ones() -> None:
    sections = sampled_sections()
    assert {policy_preset(each).title for each in sections} == {each.title for each in POLICY_PRESETS.values()}
    for given in sections:
        suited = suit_policy(given)
        assert type(given).model_validate(suited.model_dump()) == suited  # within the bounds of the options
        assert describe_policy(given).count("differs") == 0
        missing = [name for name in ("num_generations", "num_passes", "advantage") if getattr(suited, name, 0) is None]
        assert not missing
    own = section("grpo", preset="dapo", clip_range=0.1, kl={"coef": 0.5})
    suited = suit_policy(own)
    assert (suited.clip_range, suited.clip_range_high, suited.kl.coef, suited.aggregation) == (0.1, 0.28, 0.5, "tokens")
    assert describe_policy(own).endswith("This run differs: clip_range 0.1, kl.coef 0.5.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_has_a_learning_rate(kind: ObjectiveKind) -> None:
    common = {"model": {"id": "m"}, "data": {"sources": [{"path": "x"}]}, "output": "o", "objective": section(kind)}
    runs = [Run.model_validate({**common, "adapter": {"kind": adapter}}) for adapter in ("lora", "none")]
    assert all(run.optim.lr is None for run in runs)
    expected = {"sft": [2e-4, 2e-4], "dpo": [2e-5, 1e-6], "reward": [1e-4, 1e-5]}
    found = [run.optimizer.lr or 0.0 for run in runs]
    assert found == expected.get(kind, found) and found[0] >= found[1] > 0
    assert runs[0].model_copy(update={"optim": runs[0].optim.model_copy(update={"lr": 3.0})}).optimizer.lr == 3.0
