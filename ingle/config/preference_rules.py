"""Invalid combinations of the options of preferences and rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ingle.config.objective import reads_answers
from ingle.config.preferences import Bco, Cpo, Dpo, Kto, Reward
from ingle.config.rule import Rule
from ingle.config.run import Run
from ingle.config.section import Section

#: Losses of the difference of two log-ratios, in which the normalization of a divergence cancels.
_OF_DIFFERENCE = ("sigmoid", "robust", "hinge", "exo", "discopop")
#: Losses of log-ratios per token.
_PER_TOKEN = ("ipo", "sigmoid_norm")

#: Losses that compare the distributions of all tokens.
_OF_TOKENS = ("tdpo1", "tdpo2")

#: When an option is read; the others always are.
_READ: Mapping[type[Section], Mapping[str, Callable[[Any], bool]]] = {
    Dpo: {
        "label_smoothing": lambda dpo: dpo.loss in ("sigmoid", "sigmoid_norm", "robust", "exo"),
        "divergence": lambda dpo: dpo.loss in _OF_DIFFERENCE,
        "divergence_alpha": lambda dpo: dpo.divergence == "alpha" and dpo.loss in _OF_DIFFERENCE,
        "penalty": lambda dpo: dpo.loss == "dpop",
        "kl_weight": lambda dpo: dpo.loss == "tdpo2",
        "tail_weight": lambda dpo: dpo.loss not in (*_PER_TOKEN, *_OF_TOKENS),
        "temperature": lambda dpo: dpo.loss == "discopop",
    },
    Cpo: {"label_smoothing": lambda cpo: cpo.loss == "sigmoid"},
    Kto: {"baseline": lambda kto: kto.loss == "kto"},
    Reward: {"margin_scale": lambda reward: reward.margin == "scores"},
}


def _unread(run: Run) -> str:
    """Returns the options that differ from their defaults and that the objective does not read."""
    objective = run.objective
    fields = type(objective).model_fields
    return ", ".join(
        f"objective.{name}"
        for name, is_read in _READ.get(type(objective), {}).items()
        if getattr(objective, name) != fields[name].default and not is_read(objective)
    )


def has_reference(run: Run) -> bool:
    """Returns whether the loss compares the model with its reference."""
    return isinstance(run.objective, Dpo | Kto | Bco)


PREFERENCE_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "preference-options-are-read",
        lambda run: bool(_unread(run)),
        lambda run: f"{_unread(run)} has no effect with this objective.",
        "objective.kind, objective.loss",
        lambda run: f"remove {_unread(run)}, or choose another objective.loss",
    ),
    Rule(
        "exo-smooths",
        lambda run: (
            isinstance(run.objective, Dpo) and run.objective.loss == "exo" and run.objective.label_smoothing == 0
        ),
        "The loss exo is infinite without label smoothing.",
        "objective.loss, objective.label_smoothing",
        ("objective.label_smoothing=1e-3",),
    ),
    Rule(
        "tdpo-needs-an-adapter",
        lambda run: isinstance(run.objective, Dpo) and run.objective.loss in _OF_TOKENS and run.adapter.kind == "none",
        "This loss reads the distributions of the reference at every step, and full fine-tuning changes them.",
        "objective.loss, adapter.kind",
        ("adapter.kind=lora",),
    ),
    Rule(
        "reference-without-dropout",
        lambda run: has_reference(run) and getattr(run.adapter, "dropout", 0) > 0,
        "Dropout in the adapter would be part of every log-ratio to the reference.",
        "adapter.dropout, objective.kind",
        ("adapter.dropout=0",),
    ),
    Rule(
        "answers-carry-the-loss",
        lambda run: reads_answers(run.objective.kind) and run.data.train_on == "all",
        lambda run: f"{run.objective.kind} compares answers, so prompts carry no loss.",
        "data.train_on, objective.kind",
        "remove data.train_on",
    ),
)
