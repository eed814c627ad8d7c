"""The published values of objectives that sample answers: what an option that is null means.

Where an option has no value here, the default of its section holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ingle.config.policy import SampledConfig
from ingle.config.section import Section

_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True)
class PolicyPreset:
    """The values of a method.

    Attributes:
        title: Its name.
        options: Values of options of ``objective``, by dotted path.
        source: Where they are from.
        run: What else its authors' runs used, which the hardware decides.
    """

    title: str
    options: Mapping[str, Any]
    source: str
    run: str = ""


_KL_IN_REWARD = {"kl.place": "reward", "kl.estimator": "k1", "kl.coef": 0.05}
_KL_MEASURED = {"kl.place": "measure", "kl.estimator": "k1", "kl.coef": 0.0}
_CLIP = {"clip": "ppo", "clip_range": 0.2}
_GROUPS = {"num_generations": 8, "num_passes": 1, "unfinished": "score", "refill": 0, "importance": "token", **_CLIP}
_GRPO = {**_GROUPS, "advantage": "group_std", "aggregation": "answers", **_KL_MEASURED}

#: By ``objective.preset``, and by the kind of objectives without one.
POLICY_PRESETS: Mapping[str, PolicyPreset] = {
    "ppo": PolicyPreset(
        "PPO",
        {
            "num_generations": 1,
            "num_passes": 4,
            "importance": "token",
            "aggregation": "tokens",
            **_CLIP,
            **_KL_IN_REWARD,
            "unfinished": "replace",
        },
        "Huang et al. 2024, arXiv 2403.17031",
        run="learning rate 3e-6, 1 minibatch, temperature 0.7, 53 tokens",
    ),
    "grpo": PolicyPreset(
        "GRPO",
        {**_GRPO, "kl.place": "loss", "kl.estimator": "k3", "kl.coef": 0.04},
        "Shao et al. 2024, arXiv 2402.03300",
        run="64 answers, learning rate 1e-6, 1,024 tokens",
    ),
    "dr_grpo": PolicyPreset(
        "Dr. GRPO",
        {**_GRPO, "advantage": "group_mean", "aggregation": "constant"},
        "Liu et al. 2025, arXiv 2503.20783",
        run="8 answers, 3,000 tokens",
    ),
    "dapo": PolicyPreset(
        "DAPO",
        {**_GRPO, "aggregation": "tokens", "clip_range_high": 0.28, "refill": 4, "unfinished": "mask"},
        "Yu et al. 2025, arXiv 2503.14476",
        run="16 answers, 20,480 tokens, a reward of kind overlong",
    ),
    "gspo": PolicyPreset(
        "GSPO",
        {**_GRPO, "importance": "sequence_mean", "clip_range": 3e-4, "clip_range_high": 4e-4},
        "Zheng et al. 2025, arXiv 2507.18071",
        run="4 minibatches",
    ),
    "cispo": PolicyPreset(
        "CISPO",
        {**_GRPO, "advantage": "batch_std", "aggregation": "tokens", "clip": "cispo", "clip_bound": 5.0},
        "MiniMax 2025, arXiv 2506.13585",
        run="16 answers",
    ),
    "lite_ppo": PolicyPreset(
        "Lite PPO",
        {**_GRPO, "advantage": "batch_std", "aggregation": "tokens"},
        "Liu et al. 2025, arXiv 2508.08221",
        run="8 answers, temperature 0.99",
    ),
    "rloo": PolicyPreset(
        "RLOO",
        {
            **_GROUPS,
            "num_generations": 4,
            "advantage": "leave_one_out",
            "importance": "sequence",
            "aggregation": "answer_sums",
            **_KL_IN_REWARD,
        },
        "Ahmadian et al. 2024, arXiv 2402.14740",
        run="2 or 4 answers",
    ),
    "reinforce": PolicyPreset(
        "REINFORCE",
        {
            **_GROUPS,
            "num_generations": 1,
            "advantage": "moving",
            "importance": "none",
            "clip": "none",
            "aggregation": "answer_sums",
            **_KL_IN_REWARD,
        },
        "Williams 1992; KL as in Ahmadian et al. 2024, arXiv 2402.14740",
    ),
    "reinforce_pp": PolicyPreset(
        "REINFORCE++",
        {
            **_GROUPS,
            "num_generations": 1,
            "advantage": "discounted_whitened",
            "aggregation": "tokens",
            **_KL_IN_REWARD,
            "kl.coef": 0.01,
        },
        "Hu 2025, arXiv 2501.03262",
    ),
    "raft": PolicyPreset("RAFT", {"num_generations": 8, "unfinished": "score"}, "Dong et al. 2023, arXiv 2304.06767"),
    "online_dpo": PolicyPreset(
        "online DPO",
        {"num_generations": 2, "unfinished": "score", "beta": 0.1, "label_smoothing": 0.0},
        "Guo et al. 2024, arXiv 2402.04792",
        run="learning rate 5e-7, temperature 0.9, 64 tokens",
    ),
    "distill": PolicyPreset("on-policy distillation", {"num_generations": 1}, "Agarwal et al. 2024, arXiv 2306.13649"),
}


def policy_preset(objective: SampledConfig) -> PolicyPreset:
    """Returns the published values of an objective."""
    return POLICY_PRESETS[getattr(objective, "preset", None) or objective.kind]


def suit_policy(objective: _S) -> _S:
    """Returns the objective with the published value in the place of every option that is null and has one."""
    filled: Section = objective
    for path, value in policy_preset(objective).options.items():  # type: ignore[arg-type] # of those sections
        if _get(filled, path) is None:
            filled = _with(filled, path, value)
    return filled  # type: ignore[return-value] # the same section


def describe_policy(objective: SampledConfig) -> str:
    """Returns a sentence that names the method, its values and the options that differ from it."""
    preset = policy_preset(objective)
    values = ", ".join(f"{path} {value}" for path, value in preset.options.items())
    changed = ", ".join(_changes(suit_policy(objective), preset))
    runs = f" Its authors ran it with {preset.run}." if preset.run else ""
    sentence = f"{preset.title} ({preset.source}): {values}.{runs}"
    return f"{sentence} This run differs: {changed}." if changed else sentence


def _changes(objective: Section, preset: PolicyPreset) -> Iterator[str]:
    for path, value in preset.options.items():
        if (own := _get(objective, path)) != value:
            yield f"{path} {own}"


def _get(section: Section, path: str) -> Any:
    name, _, rest = path.partition(".")
    value = getattr(section, name)
    return _get(value, rest) if rest else value


def _with(section: Section, path: str, value: Any) -> Section:
    name, _, rest = path.partition(".")
    new = _with(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: new})
