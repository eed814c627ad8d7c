"""``objective:`` learning from sampled answers: rewards, policies and distillation.

An option that is null has the value of the published method: see :mod:`ingle.config.policy_presets`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.preferences import DpoLoss
from ingle.config.rewards import Rewards
from ingle.config.section import Count, Positive, Section, Strings, Text

#: What the reward of an answer is compared with; see :mod:`ingle.objectives.rollouts.advantages`.
Advantage = Literal[
    "group_std",
    "group_mean",
    "leave_one_out",
    "batch_std",
    "length_weighted",
    "greedy",
    "moving",
    "discounted_whitened",
]
#: What the probability ratio of a token is made of; see :mod:`ingle.objectives.policy_losses`.
Importance = Literal["token", "sequence", "sequence_mean", "none"]
ClipKind = Literal["ppo", "two_sided", "dual", "cispo", "none"]
#: What a loss is a mean over.
Aggregation = Literal["tokens", "answers", "answer_sums", "constant"]
KlEstimator = Literal["k1", "k2", "k3", "k3_corrected"]
#: How the weight of the divergence from the reference follows its measurement.
KlControlKind = Literal["fixed", "adaptive", "budget"]
#: What an answer without an end is worth.
Unfinished = Literal["score", "add", "replace", "mask"]
#: The token that carries the score: the last one of the answer, or the place after it.
ScoreAt = Literal["last_token", "after"]
#: What is done with answers that the trained policy and the sampler find differently likely.
Correction = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence"]

#: What an alarm does.
AlarmAction = Literal["off", "warn", "stop"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Weight = Annotated[float, Field(ge=0, le=1e6)]


class RolloutConfig(Section):
    """How answers are sampled.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: Sampling temperature. The loss reads log-probabilities at the same temperature.
        top_p: Sample from the most likely tokens that together have this probability. Policies need 1.
        stop: Strings that end an answer, in addition to the end-of-turn token.
        num_slots: Answers that are computed together.
        correction: What is done where the trained model and the sampler give a token different probabilities:
            ``truncate`` weights the loss by their ratio, up to the threshold; ``mask`` drops what is above it.
        correction_level: Whether the ratio is that of a token or of the whole answer.
        correction_threshold: Largest ratio.
        num_shown: Sampled answers to show in each iteration.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Strings = ()
    num_slots: Annotated[int, Field(ge=1, le=65_536)] = 64
    correction: Correction = "none"
    correction_level: CorrectionLevel = "token"
    correction_threshold: Positive = 2.0
    num_shown: Annotated[int, Field(ge=0, le=10_000)] = 2


class KlConfig(Section):
    """How the policy is kept near its reference, which is the model before training.

    Attributes:
        place: ``reward``: each token costs its divergence; ``loss``: it is a term of the loss; ``measure``: it is only
            logged; ``none``: it is not computed.
        coef: Weight of the divergence, in units of the reward per nat; the first one if it is controlled.
        estimator: Estimate from the sampled token. In the loss, the gradient of ``k2`` and ``k3_corrected`` is that of
            the divergence from the reference, that of ``k3`` the one of the opposite divergence; ``k1`` has none.
        level: Whether ``k2`` in the loss is that of tokens or of whole answers. Only the latter includes how a token
            changes the ones after it.
        control: ``adaptive`` changes the weight so that the divergence becomes ``target``.
        target: Divergence that ``adaptive`` aims at, in nats per answer.
        horizon: Answers in which ``adaptive`` can change the weight by 20 %.
        budget: Largest divergence at the end of the run, in nats per answer. The weight rises when the forecast is
            beyond it.
    """

    place: Literal["none", "measure", "reward", "loss"] | None = None
    coef: _Weight | None = None
    estimator: KlEstimator | None = None
    level: Literal["token", "answer"] = "token"
    control: Literal["fixed", "adaptive"] = "fixed"
    target: Positive = 6.0
    horizon: Positive = 10_000.0
    budget: Positive | None = None


class Sampled(Section):
    """Options of everything that learns from answers that the model itself samples.

    Attributes:
        num_prompts: Prompts of an iteration: answers are sampled, scored and then learned from.
        num_generations: Answers to each prompt.
        rollout: How answers are sampled.
        share_prompts: Compute the prompt once for all answers to it; ``auto``: where the model allows it.
    """

    num_prompts: Count = 16
    num_generations: Annotated[int, Field(ge=1, le=65_536)] | None = None
    rollout: RolloutConfig = RolloutConfig()
    share_prompts: Literal["auto"] | bool = "auto"


class AlarmConfig(Section):
    """What to do about signs that the policy pleases the reward instead of doing the task.

    A sign counts when it has lasted for three iterations. ``warn`` reports it; ``stop`` ends the run with the last
    checkpoint from before it.

    Attributes:
        proxy: A reward of weight 0, which is measured but not learned from, falls while the reward rises.
        length: Longer, or shorter, answers get the reward, or answers have become half as long again.
        repetition: Answers repeat themselves, or are the same.
        entropy: The policy has lost nine tenths of its entropy.
        kl: The divergence from the reference is beyond its budget, or twice its target.
        mismatch: The sampler has other probabilities than the update.
        idle: Answers to four of five prompts have equal rewards, which teach nothing.
    """

    proxy: AlarmAction = "stop"
    length: AlarmAction = "warn"
    repetition: AlarmAction = "warn"
    entropy: AlarmAction = "warn"
    kl: AlarmAction = "stop"
    mismatch: AlarmAction = "warn"
    idle: AlarmAction = "warn"


class Rewarded(Sampled):
    """Options of everything that learns from rewards.

    Attributes:
        rewards: What an answer is worth. A text is short for ``{kind: function, path: ...}``.
        combine: ``sum`` adds the rewards with their weights; ``normalize_then_sum`` scales each one within the answers
            to a prompt first.
        max_failed: The run ends if a larger share of the answers of an iteration could not be scored.
        unfinished: Reward of an answer without an end: its ``score``, ``unfinished_value`` in addition or in its place,
            or none: ``mask`` leaves the answer out of the loss.
        unfinished_value: See ``unfinished``.
        alarms: What to do about signs that the policy pleases the reward instead of doing the task.
    """

    rewards: Rewards
    combine: Literal["sum", "normalize_then_sum"] = "sum"
    max_failed: _Share = 0.2
    unfinished: Unfinished | None = None
    unfinished_value: Annotated[float, Field(ge=-999, le=999)] = -1.0
    alarms: AlarmConfig = AlarmConfig()


class PolicyGradient(Rewarded):
    """Options of policy gradients.

    Attributes:
        num_passes: Passes over the answers of an iteration.
        importance: What the probability ratio of a token is made of: its own probability, that of the answer, or the
            geometric mean over the answer; ``none`` is REINFORCE, which learns from fresh answers only.
        aggregation: What the loss is a mean over: ``tokens``; ``answers``, of the mean over their tokens;
            ``answer_sums``, of the sum; ``constant`` divides by the answers and ``rollout.max_new_tokens``.
        clip: How the ratio is bounded; ``two_sided``, ``dual`` and ``cispo`` read ``clip_bound``.
        clip_range: Distance of the ratio below 1 at which a token stops learning.
        clip_range_high: The same above 1; as ``clip_range`` if null.
        clip_bound: Largest ratio.
        entropy_coef: Weight of the entropy in the loss, which it raises.
        top_entropy: Learn only from this share of the tokens: those at which the policy was least sure.
        kl: How the policy is kept near its reference.
    """

    num_passes: Annotated[int, Field(ge=1, le=1000)] | None = None
    importance: Importance | None = None
    aggregation: Aggregation | None = None
    clip: ClipKind | None = None
    clip_range: Positive | None = None
    clip_range_high: Positive | None = None
    clip_bound: Positive | None = None
    entropy_coef: _Weight = 0.0
    top_entropy: Annotated[float, Field(gt=0, le=1)] = 1.0
    kl: KlConfig = KlConfig()


class _Compared(PolicyGradient):
    """Options of policy gradients without a value function.

    Attributes:
        advantage: What the reward of an answer is compared with: the mean of the answers to its prompt, divided by
            their standard deviation (``group_std``), by that of all answers (``batch_std``), or by nothing
            (``group_mean``); the mean of the others (``leave_one_out``); the mean weighted by length
            (``length_weighted``); the mean of earlier iterations (``moving``). ``discounted_whitened`` scales the
            discounted rewards of all tokens.
        refill: Replace prompts whose answers all have the same reward, by at most this many times ``num_prompts``.
        gamma: Discount of later rewards (``discounted_whitened``).
    """

    advantage: (
        Literal[
            "group_std",
            "group_mean",
            "leave_one_out",
            "batch_std",
            "length_weighted",
            "moving",
            "discounted_whitened",
        ]
        | None
    ) = None
    refill: Annotated[int, Field(ge=0, le=1000)] | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0


class Grpo(_Compared):
    """Group relative policy optimization: compares the answers to a prompt with each other.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1.

    Attributes:
        preset: Corrections of the method: their values for options that are null.
    """

    kind: Literal["grpo"]
    preset: Literal["dr_grpo", "dapo", "gspo", "cispo", "lite_ppo"] | None = None


class Rloo(_Compared):
    """REINFORCE with the mean reward of the other answers to a prompt as baseline.

    Source: Ahmadian et al. 2024, "Back to basics" (arXiv 2402.14740), section 3.2.
    """

    kind: Literal["rloo"]


class Reinforce(_Compared):
    """REINFORCE with the mean reward of earlier iterations as baseline.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".

    Attributes:
        preset: ``reinforce_pp``: REINFORCE++ (arXiv 2501.03262), its values for options that are null.
    """

    kind: Literal["reinforce"]
    preset: Literal["reinforce_pp"] | None = None


class ValueConfig(Section):
    """The value function of ``ppo``: a head that predicts the reward to come at each token.

    Attributes:
        trunk: What the head reads: an ``adapter`` of its own on the frozen base, or the hidden states of the policy.
        rank: Rank of that adapter; as that of the policy if null.
        coef: Weight of its loss.
        clip_range: Largest change of a value in an iteration, in units of the reward; null for no bound.
        lr_ratio: Its learning rate, as a factor on ``optim.lr``.
        detach: Whether its loss leaves the policy alone (``trunk: policy``).
        path: A run of ``kind: reward`` on the same base to start from.
    """

    trunk: Literal["adapter", "policy"] = "adapter"
    rank: Annotated[int, Field(ge=1, le=65_536)] | None = None
    coef: _Weight = 0.1
    clip_range: Positive | None = 0.2
    lr_ratio: Positive = 1.0
    detach: bool = True
    path: Text | None = None


class Ppo(PolicyGradient):
    """Proximal policy optimization with a value function.

    Source: Schulman et al. 2017, "PPO" (arXiv 1707.06347); Huang et al. 2024, "The N+ implementation details of RLHF
    with PPO" (arXiv 2403.17031).

    Attributes:
        gamma: Discount of later rewards.
        gae_lambda: Weight of longer estimates of the advantage.
        whiten: Scale the advantages of an iteration to mean 0 and variance 1.
        whiten_rewards: Scale the rewards of tokens to variance 1.
        scale_rewards: ``running`` divides rewards by the standard deviation of all rewards so far.
        value: The value function.
    """

    kind: Literal["ppo"]
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: _Share = 0.95
    whiten: bool = True
    whiten_rewards: bool = False
    scale_rewards: Literal["none", "running"] = "none"
    value: ValueConfig = ValueConfig()


class Raft(Rewarded):
    """Rejection sampling: fine-tunes on the best of the sampled answers.

    Source: Dong et al. 2023, "RAFT" (arXiv 2304.06767), algorithm 1.
    """

    kind: Literal["raft"]


class OnlineDpo(Rewarded):
    """Preference optimization of sampled answers: the best one against the worst one of each prompt.

    Source: Guo et al. 2024, "Direct language model alignment from online AI feedback" (arXiv 2402.04792).

    Attributes:
        loss: The loss of a pair, as for ``dpo``.
        beta: Strength of the reference.
        label_smoothing: Rate of wrong comparisons.
    """

    kind: Literal["online_dpo"]
    loss: DpoLoss = "sigmoid"
    beta: Positive | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None


class Distill(Sampled):
    """On-policy distillation: the teacher's distribution at every token of the student's own answers.

    Source: Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649), equations 1 and 4.

    Attributes:
        teacher: The model that is distilled: a run folder, an adapter folder, a model folder or a hub id. It has the
            same vocabulary.
        beta: 0 is the forward divergence from teacher to student, 1 the reverse one; between them, the generalized
            Jensen-Shannon divergence.
        on_policy_share: 1: the student answers the prompts; 0: it learns from the answers in the data.
    """

    kind: Literal["distill"]
    teacher: Text
    beta: _Share = 1.0
    on_policy_share: _Share = 1.0


#: Objectives that sample answers.
SampledConfig = Ppo | Grpo | Rloo | Reinforce | Raft | OnlineDpo | Distill
#: Objectives whose loss is a policy gradient.
PolicyConfig = Ppo | Grpo | Rloo | Reinforce
