"""The values of the options with which a policy is trained on sampled answers."""

from __future__ import annotations

from typing import Literal

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
