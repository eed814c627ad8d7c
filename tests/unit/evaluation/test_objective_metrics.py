"""The metrics that each objective allows are those that its model has outputs for."""

from __future__ import annotations

from typing import get_args

import pytest

from ingle.config.evaluate import METRICS_OF, suitable_metrics
from ingle.config.objective import Answer, Classify, Mlm, ObjectiveKind, Sft, Span, Tag
from ingle.evaluation.run.reward_source import RewardSource
from ingle.evaluation.run.task_sources import ContextSource, LabelSource, MaskedSource, ModelSource, TargetSource
from ingle.report.metrics import METRICS

_SOURCES = {
    "clm": ModelSource,
    "sft": ModelSource,
    "span": TargetSource,
    "seq2seq": TargetSource,
    "mlm": MaskedSource,
    "classify": LabelSource,
    "tag": LabelSource,
    "answer": ContextSource,
    "reward": RewardSource,
    **dict.fromkeys(("dpo", "kto", "orpo", "simpo", "cpo", "bco"), ModelSource),
    **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "online_dpo", "raft", "distill"), ModelSource),
}


@pytest.mark.parametrize("kind", get_args(ObjectiveKind))
def test_models_have_the_outputs_of_their_metrics(kind: ObjectiveKind) -> None:
    for name, metric in METRICS.items():
        if name in METRICS_OF[kind]:
            assert hasattr(_SOURCES[kind], metric.reads), name


def test_every_metric_suits_an_objective_and_defaults_are_allowed() -> None:
    assert set().union(*METRICS_OF.values()) == set(METRICS)
    for objective in (
        Sft(),
        Mlm(kind="mlm"),
        Span(kind="span"),
        Classify(kind="classify", problem="single"),
        Classify(kind="classify", problem="multi"),
        Classify(kind="classify", problem="regression"),
        Tag(kind="tag"),
        Answer(kind="answer"),
    ):
        assert set(suitable_metrics(objective)) <= METRICS_OF[objective.kind]
