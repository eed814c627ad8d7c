"""Invalid combinations of the options of objectives that sample answers."""

from __future__ import annotations

from ingle.config.adapter import LowRankAdapter, NoAdapter
from ingle.config.objective import rows_of, samples_answers
from ingle.config.policy import Distill, Grpo, OnlineDpo, Ppo, Raft, Reinforce, Rloo, Sampled
from ingle.config.policy_presets import suit_policy
from ingle.config.rule import Rule
from ingle.config.run import Run

_POLICIES = (Ppo, Grpo, Rloo, Reinforce)
#: Advantages that compare the answers to one prompt.
_OF_GROUPS = ("group_std", "group_mean", "leave_one_out", "length_weighted")


def rows_per_iteration(objective: Sampled) -> int:
    """Returns the rows that an iteration gives the update: answers; pairs of ``online_dpo``."""
    suited = suit_policy(objective)
    assert suited.num_generations is not None
    per_prompt = 1 if isinstance(suited, Raft | OnlineDpo) else suited.num_generations
    return suited.num_prompts * per_prompt


def num_passes(run: Run) -> int:
    """Returns how often an epoch reads each of its rows."""
    passes = getattr(suit_policy(run.objective), "num_passes", 1) if isinstance(run.objective, Sampled) else 1
    return passes or 1


def steps_per_iteration(run: Run) -> int:
    """Returns the optimizer steps that learn from the answers of an iteration."""
    assert isinstance(run.objective, Sampled)
    return num_passes(run) * rows_per_iteration(run.objective) // run.train.global_batch_size


def reads_reference(run: Run) -> bool:
    """Returns whether a run that samples answers compares the model with its reference."""
    if isinstance(run.objective, _POLICIES):
        return suit_policy(run.objective).kl.place != "none"
    return isinstance(run.objective, OnlineDpo)


def _left_over(run: Run) -> int:
    """Returns the answers of an iteration that fill no minibatch."""
    objective = run.objective
    is_sampled = isinstance(objective, Sampled) and samples_answers(rows_of(objective).kind)
    rows = rows_per_iteration(objective) if isinstance(objective, Sampled) and is_sampled else 0
    return rows % run.train.global_batch_size


def _fitting(run: Run) -> tuple[str, ...]:
    """Returns the batch sizes next to the given one that divide the answers of an iteration."""
    assert isinstance(run.objective, Sampled)
    rows = rows_per_iteration(run.objective)
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    nearest = sorted(sizes, key=lambda size: abs(size - run.train.global_batch_size))[:2]
    return tuple(f"train.global_batch_size={size}" for size in sorted(nearest))


def _group(run: Run) -> int:
    """Returns the answers to a prompt; 2 for an objective that compares none."""
    if not isinstance(run.objective, Sampled):
        return 2
    objective = suit_policy(run.objective)
    compares = getattr(objective, "combine", "sum") == "normalize_then_sum" or isinstance(objective, Raft | OnlineDpo)
    compares = compares or getattr(objective, "advantage", None) in _OF_GROUPS
    return (objective.num_generations or 1) if compares else 2


def _has_idle_divergence(run: Run) -> bool:
    """Returns whether a divergence in the reward has no effect, since scaled rewards are advantages already."""
    if not isinstance(run.objective, Grpo | Rloo | Reinforce):
        return False
    objective = suit_policy(run.objective)
    is_scaled = objective.combine == "normalize_then_sum" and objective.advantage != "discounted_whitened"
    return is_scaled and objective.kl.place == "reward"


def _reused(run: Run) -> bool:
    """Returns whether REINFORCE, whose loss has no ratio, would learn from answers of older weights."""
    if not isinstance(run.objective, _POLICIES):
        return False
    objective = suit_policy(run.objective)
    return objective.importance == "none" and steps_per_iteration(run) > 1


POLICY_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "minibatches-fill-an-iteration",
        lambda run: bool(_left_over(run)),
        lambda run: (
            f"An iteration of {rows_per_iteration(run.objective) if isinstance(run.objective, Sampled) else 0} "
            f"answers cannot be cut into steps of {run.train.global_batch_size}."
        ),
        "train.global_batch_size, objective.num_prompts, objective.num_generations",
        _fitting,
    ),
    Rule(
        "groups-have-two",
        lambda run: _group(run) < 2,
        lambda run: f"{run.objective.kind} compares the answers to a prompt, so it needs two or more of them.",
        "objective.num_generations",
        ("objective.num_generations=8",),
    ),
    Rule(
        "sampled-objectives-need-no-dropout",
        lambda run: (
            samples_answers(run.objective.kind) and isinstance(run.adapter, LowRankAdapter) and run.adapter.dropout > 0
        ),
        "Answers would be sampled from another function than the one that is trained: the adapter has dropout.",
        "adapter.dropout, objective.kind",
        ("adapter.dropout=0",),
    ),
    Rule(
        "values-need-an-adapter",
        lambda run: (
            isinstance(run.objective, Ppo)
            and run.objective.value.trunk == "adapter"
            and not isinstance(run.adapter, LowRankAdapter)
        ),
        "The value function needs low-rank adapters, next to those of the policy.",
        "objective.value.trunk, adapter.kind",
        ("objective.value.trunk=policy", "adapter.kind=lora"),
    ),
    Rule(
        "values-of-the-policy-begin-anew",
        lambda run: (
            isinstance(run.objective, Ppo)
            and run.objective.value.trunk == "policy"
            and run.objective.value.path is not None
        ),
        "A head that reads the policy cannot begin with that of a reward model, which read another adapter.",
        "objective.value.path, objective.value.trunk",
        ("objective.value.trunk=adapter",),
    ),
    Rule(
        "policies-sample-the-full-support",
        lambda run: isinstance(run.objective, _POLICIES) and run.objective.rollout.top_p < 1,
        "With top_p below 1 the sampler has another distribution than the loss, which biases the gradient.",
        "objective.rollout.top_p",
        ("objective.rollout.top_p=1",),
    ),
    Rule(
        "k1-has-no-gradient",
        lambda run: (
            isinstance(run.objective, _POLICIES)
            and suit_policy(run.objective).kl.place == "loss"
            and (
                suit_policy(run.objective).kl.estimator == "k1"
                or (run.objective.kl.level == "answer" and suit_policy(run.objective).kl.estimator != "k2")
            )
        ),
        "This estimate of the divergence teaches nothing in the loss: k1 has the gradient 0 in expectation, and only "
        "k2 is defined for whole answers.",
        "objective.kl.estimator, objective.kl.place",
        ("objective.kl.estimator=k2", "objective.kl.place=reward"),
    ),
    Rule(
        "budget-needs-a-weight",
        lambda run: (
            isinstance(run.objective, _POLICIES)
            and run.objective.kl.budget is not None
            and (
                suit_policy(run.objective).kl.place not in ("reward", "loss")
                or not suit_policy(run.objective).kl.coef
                or run.objective.kl.control != "fixed"
            )
        ),
        "A KL budget raises the weight of the divergence, so this must be in the reward or in the loss, with a weight "
        "above 0, and nothing else may control it.",
        "objective.kl.budget",
        "--objective.kl.place=reward --objective.kl.coef=0.05 --objective.kl.control=fixed",
    ),
    Rule(
        "scaled-rewards-keep-the-divergence-apart",
        _has_idle_divergence,
        "With combine = normalize_then_sum, rewards are advantages already: a divergence in the reward has no effect.",
        "objective.combine, objective.kl.place",
        ("objective.kl.place=loss", "objective.combine=sum"),
    ),
    Rule(
        "policies-with-reference-need-an-adapter",
        lambda run: reads_reference(run) and isinstance(run.adapter, NoAdapter),
        lambda run: (
            f"{run.objective.kind} needs an adapter: its reference is the model without it, and full fine-tuning "
            "overwrites the model."
        ),
        "adapter.kind, objective.kind",
        lambda run: (
            ("adapter.kind=lora",)
            if isinstance(run.objective, OnlineDpo)
            else ("adapter.kind=lora", "objective.kl.place=none")
        ),
    ),
    Rule(
        "reinforce-learns-once",
        _reused,
        "Without importance ratios an answer can be learned from only once, with the weights that sampled it.",
        "objective.importance, objective.num_passes, train.global_batch_size",
        lambda run: (
            f"objective.importance=token, or --objective.num_passes=1 --train.global_batch_size="
            f"{rows_per_iteration(run.objective) if isinstance(run.objective, Sampled) else 1}"
        ),
    ),
    Rule(
        "distillation-mixes-nothing",
        lambda run: isinstance(run.objective, Distill) and 0 < run.objective.on_policy_share < 1,
        "A run learns either from sampled answers (on_policy_share 1) or from those in the data (0), not from both.",
        "objective.on_policy_share",
        ("objective.on_policy_share=1", "objective.on_policy_share=0"),
    ),
    Rule(
        "distillation-answers-once",
        lambda run: isinstance(run.objective, Distill) and (run.objective.num_generations or 1) > 1,
        "Distillation compares no answers, so it samples one answer to each prompt.",
        "objective.num_generations",
        ("objective.num_generations=1",),
    ),
)
