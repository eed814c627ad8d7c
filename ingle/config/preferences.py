"""``objective:`` preferences between answers, judged answers, and reward models.

An option that is null has the value of the published method: see :mod:`ingle.config.presets`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import Positive, Section

#: The losses of ``dpo``.
DpoLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_sum",
    "exo",
    "nca",
    "bco_pair",
    "sppo",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "dpop",
    "tdpo1",
    "tdpo2",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
#: The pairs of a row with scores; answers with equal scores make none.
PairChoice = Literal["all", "best_worst", "neighbours"]

#: A weight of a loss.
_Weight = Annotated[float, Field(ge=0, le=1e6)]
#: A rate of wrong labels.
_FlipRate = Annotated[float, Field(ge=0, lt=0.5)]


class _Pairs(Section):
    """Options of everything that compares the answers of a row."""

    pairs: PairChoice = "all"
    share_prompts: Literal["auto"] | bool = "auto"


class Dpo(_Pairs):
    """Direct preference optimization: raises the log-probability of the chosen answer against that of the rejected one.

    Both are relative to the reference, which is the model before training.

    Source: Rafailov et al. 2023, "DPO" (arXiv 2305.18290), equation 7; the other losses are in the reference.

    Attributes:
        loss: The loss of a pair. ``ipo`` divides log-ratios by the lengths of answers, as the authors' runs did;
            ``ipo_sum`` is the equation of the paper.
        beta: Strength of the reference: a larger value keeps the model closer to it.
        label_smoothing: Rate of wrong labels. It makes ``sigmoid`` cDPO; ``sigmoid_norm``, ``robust`` and ``exo``
            read it, too.
        divergence: Divergence to the reference, for losses of the difference of two log-ratios.
        divergence_alpha: Order of the divergence ``alpha``.
        penalty: Weight of a falling log-probability of the chosen answer (``dpop``).
        kl_weight: Weight of the difference of the divergences (``tdpo2``).
        tail_weight: Weight of the tokens beyond the length of the shorter answer (LD-DPO).
        weighting: ``wpo`` weights each pair by how likely the model itself would answer so.
        temperature: Temperature of the mixture of ``discopop``.
        sft_weight: Weight of the cross-entropy of the chosen answers (RPO).
        pairs: The pairs of a row of scored answers: all, the best and the worst, or neighbours in the ranking.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["dpo"]
    loss: DpoLoss = "sigmoid"
    beta: Positive | None = None
    label_smoothing: _FlipRate | None = None
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    penalty: _Weight | None = None
    kl_weight: _Weight | None = None
    tail_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    weighting: Literal["none", "wpo"] = "none"
    temperature: Annotated[float, Field(gt=0, lt=1)] | None = None
    sft_weight: _Weight = 0.0


class Simpo(_Pairs):
    """Simple preference optimization: compares mean log-probabilities per token, without a reference.

    Source: Meng et al. 2024, "SimPO" (arXiv 2405.14734), equation 6; AlphaPO (arXiv 2501.03884).

    Attributes:
        beta: Factor on the difference of the mean log-probabilities.
        gamma: Margin by which the chosen answer is to win.
        alpha: Shape of the reward; above 0 it is AlphaPO.
        label_smoothing: Rate of wrong labels.
        sft_weight: Weight of the cross-entropy of the chosen answers.
        pairs: The pairs of a row of scored answers: all, the best and the worst, or neighbours in the ranking.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["simpo"]
    beta: Positive | None = None
    gamma: Annotated[float, Field(ge=0, le=1e6)] | None = None
    alpha: Annotated[float, Field(ge=0, le=100)] = 0.0
    label_smoothing: _FlipRate = 0.0
    sft_weight: _Weight = 0.0


class Cpo(_Pairs):
    """Contrastive preference optimization: DPO with a uniform reference, and cross-entropy of the chosen answers.

    Source: Xu et al. 2024, "CPO" (arXiv 2401.08417), equation 4.

    Attributes:
        loss: The loss of the difference of the log-probabilities.
        beta: Factor on the difference.
        label_smoothing: Rate of wrong labels (``sigmoid``).
        sft_weight: Weight of the cross-entropy of the chosen answers.
        pairs: The pairs of a row of scored answers: all, the best and the worst, or neighbours in the ranking.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["cpo"]
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: Positive | None = None
    label_smoothing: _FlipRate = 0.0
    sft_weight: _Weight | None = None


class Orpo(_Pairs):
    """Odds ratio preference optimization: cross-entropy of the chosen answer, and its odds against the rejected one.

    Source: Hong et al. 2024, "ORPO" (arXiv 2403.07691), equations 6 and 7.

    Attributes:
        beta: Weight of the odds ratio; lambda in the paper.
        pairs: The pairs of a row of scored answers: all, the best and the worst, or neighbours in the ranking.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["orpo"]
    beta: Positive | None = None


class _Judged(Section):
    """Options of everything that learns from single answers that are good or bad."""

    beta: Positive | None = None
    desirable_weight: Literal["auto"] | Positive = "auto"
    undesirable_weight: Literal["auto"] | Positive = "auto"
    threshold: Annotated[float, Field(ge=-100, le=1e6)] | None = None
    share_prompts: Literal["auto"] | bool = "auto"


class Kto(_Judged):
    """Kahneman-Tversky optimization: learns from answers that are good or bad, without pairs.

    Source: Ethayarajh et al. 2024, "KTO" (arXiv 2402.01306), equations 7 and 8; D'Oosterlinck et al. 2024, "APO" (arXiv
    2408.06266).

    Attributes:
        loss: ``apo_zero`` compares with the reference alone.
        beta: Strength of the reference.
        desirable_weight: Weight of good answers. ``auto`` raises the weight of the rarer class to that of the other.
        undesirable_weight: Weight of bad answers.
        threshold: Answers with a higher score are good. If null, all scores must be 1 or 0.
        baseline: What log-ratios are compared with: ``mismatched`` is the mean log-ratio of answers to other prompts,
            an estimate of the divergence from the reference; ``none`` is 0.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["kto"]
    loss: Literal["kto", "apo_zero"] = "kto"
    baseline: Literal["mismatched", "none"] = "mismatched"


class Bco(_Judged):
    """Binary classifier optimization: classifies answers as good or bad by their log-ratio to the reference.

    Log-ratios are compared with the running mean of all rewards up to the previous step.

    Source: Jung et al. 2024, "BCO" (arXiv 2404.04656), equations 8 and 11.

    Attributes:
        beta: Strength of the reference.
        desirable_weight: Weight of good answers. ``auto`` raises the weight of the rarer class to that of the other.
        undesirable_weight: Weight of bad answers.
        threshold: Answers with a higher score are good. If null, all scores must be 1 or 0.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["bco"]


class Reward(_Pairs):
    """A reward model: a head that scores an answer at its last token, higher for chosen answers.

    Source: Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), equation 1; Touvron et al. 2023, "Llama 2" (arXiv
    2307.09288), section 3.2.2 (margin).

    Attributes:
        margin: ``scores``: the chosen answer is to win by the difference of the scores in the data.
        margin_scale: Factor on that difference.
        centering: Weight of the squared sum of the two scores of a pair, which keeps their mean near 0.
        pairs: The pairs of a row of scored answers: all, the best and the worst, or neighbours in the ranking.
        share_prompts: Compute the prompt of a row once for all of its answers; ``auto``: where the model allows it.
    """

    kind: Literal["reward"]
    margin: Literal["none", "scores"] = "none"
    margin_scale: Positive = 1.0
    centering: _Weight = 0.0


#: Objectives that compare the answers of a row.
PairConfig = Dpo | Simpo | Cpo | Orpo | Reward
#: Objectives that learn from single answers.
JudgedConfig = Kto | Bco
