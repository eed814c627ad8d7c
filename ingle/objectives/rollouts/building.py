"""Builds the objectives that sample answers from the config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ingle import env
from ingle.config.policy import (
    Grpo,
    OnlineDpo,
    PolicyGradient,
    Ppo,
    Raft,
    Reinforce,
    Rewarded,
    Rloo,
    Sampled,
    SampledConfig,
)
from ingle.config.policy_presets import suit_policy
from ingle.config.policy_rules import reads_reference
from ingle.config.preferences import Dpo
from ingle.config.rewards import ModelReward, reward_names
from ingle.config.run import Run
from ingle.data import HeldOut, PromptSet, Sequences, SequenceSampler
from ingle.errors import ConfigError
from ingle.models import Model, Sampler, Sampling, compute_dtype, make_sampler
from ingle.models.forward.layout import layout_of
from ingle.objectives.interface import StepModule
from ingle.objectives.lm import NextTokenLoss
from ingle.objectives.pairs import PairLoss
from ingle.objectives.policy import PolicyLoss
from ingle.objectives.preferences import Initial
from ingle.objectives.reward_models import RewardModel, insert_reward_role
from ingle.objectives.rollouts.alarms import Alarms
from ingle.objectives.rollouts.collecting import Collector
from ingle.objectives.rollouts.driver import RolloutObjective
from ingle.objectives.rollouts.recipes import BestAndWorst, BestOfN, Policy, Recipe
from ingle.objectives.values import insert_role as insert_value
from ingle.objectives.values import make_values
from ingle.parallel import Mesh
from ingle.rewards import RewardPool, digest


def insert_roles(model: Model, run: Run) -> dict[int, tuple[str, str | None]]:
    """Adds the roles of an objective to a model with its adapter inserted, before it is sharded.

    Returns:
        Path and role of each trained reward model by the number of its reward; None for the role of one that is a
        model of its own.

    Raises:
        AdapterError: The adapter that a role begins with cannot be read.
    """
    if isinstance(run.objective, Ppo):
        insert_value(model, run.objective.value, run.adapter)
    return {
        number: (reward.path, insert_reward_role(model, run, number, reward.path))
        for number, reward in enumerate(run.objective.rewards if isinstance(run.objective, Rewarded) else ())
        if isinstance(reward, ModelReward)
    }


def sampled_loss(run: Run, model: Model, mesh: Mesh) -> StepModule:
    """Returns the loss of an objective that samples answers.

    Raises:
        ConfigError: The objective is not there yet.
    """
    objective = run.objective
    match objective:
        case Grpo() | Rloo() | Reinforce():
            return PolicyLoss(model, objective)
        case Ppo():
            return PolicyLoss(model, objective, make_values(model, objective.value, mesh.device))
        case Raft():
            return NextTokenLoss(model)
        case OnlineDpo():
            return PairLoss(model, as_dpo(objective), is_sampled=True)
    raise ConfigError(
        f"This version does not train objective.kind = {objective.kind}.",
        where="objective.kind",
        fix="--objective.kind=grpo",
    )


def as_dpo(config: OnlineDpo) -> Dpo:
    """Returns the objective of the pairs that are sampled."""
    suited = suit_policy(config)
    smoothing = suited.label_smoothing or None
    return Dpo(kind="dpo", loss=suited.loss, beta=suited.beta, label_smoothing=smoothing, pairs="best_worst")


def _recipe(objective: SampledConfig) -> Recipe:
    weights = np.array([reward.weight for reward in objective.rewards] if isinstance(objective, Rewarded) else [])
    match objective:
        case Ppo() | Grpo() | Rloo() | Reinforce():
            return Policy(objective, weights)
        case Raft():
            return BestOfN(objective, weights)
        case OnlineDpo():
            return BestAndWorst(objective, weights)
    return Recipe(objective, weights)


def sampled_objective(
    run: Run,
    module: StepModule,
    *,
    prompts: PromptSet,
    sequences: Sequences,
    tokenizer: Any,
    initial: Initial,
    models: Mapping[int, RewardModel],
    held_out: HeldOut | None,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    shards: bool,
    mesh: Mesh,
) -> RolloutObjective:
    """Returns the objective of a run that samples answers.

    Args:
        run: The run.
        module: Its loss.
        prompts: The prompts.
        sequences: Those to train on, each alone.
        tokenizer: The model's tokenizer.
        initial: Makes the model compute its initial function.
        models: Trained reward models, by the number of their reward.
        held_out: Prompts for validation; None without.
        num_steps: Steps of the run.
        global_batch_size: Answers, or pairs, of a step.
        micro_batch_size: Documents of a forward pass.
        shards: Whether forward passes are collective.
        mesh: The ranks.

    Raises:
        ConfigError: Prompts are to be shared in a model that cannot share them.
    """
    objective = run.objective
    assert isinstance(objective, SampledConfig)
    suited = suit_policy(objective)
    assert suited.num_generations is not None
    rollout, model = suited.rollout, module.model
    sampling = Sampling(run.seed, rollout.temperature, rollout.top_p, rollout.stop, rollout.num_slots)
    output = Path(run.output)
    collector = Collector(
        prompts,
        SequenceSampler(sequences, run.seed, run.data.shuffle),
        make_sampler=partial(_sampler, model, tokenizer, sampling, mesh if shards else None),
        make_pool=_pool_maker(suited, output),
        models=models,
        names=reward_names(suited.rewards) if isinstance(suited, Rewarded) else (),
        tokenizer=tokenizer,
        num_generations=suited.num_generations,
        max_new_tokens=rollout.max_new_tokens,
        refill=getattr(suited, "refill", 0) or 0,
        stop=rollout.stop,
        max_failed=getattr(suited, "max_failed", 1.0),
        num_shown=rollout.num_shown,
        num_steps=num_steps,
        origin={"options": _origin(run)},
        folder=output / "rollouts",
        mesh=mesh,
    )
    return RolloutObjective(
        module,
        _recipe(objective),
        collector,
        initial=initial if reads_reference(run) else None,
        num_prompts=suited.num_prompts,
        num_passes=getattr(suited, "num_passes", 1) or 1,
        num_steps=num_steps,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        shares=_shares(suited, model),
        seed=run.seed,
        mesh=mesh,
        held_out=held_out,
        is_precise=compute_dtype(run.model.dtype, mesh.device) == torch.float32,
        alarms=_alarms(objective),
    )


def _alarms(objective: Sampled) -> Alarms | None:
    if not isinstance(objective, Rewarded):
        return None
    kl_limit = None
    if isinstance(objective, PolicyGradient):
        kl = objective.kl
        kl_limit = kl.budget if kl.budget is not None else 2 * kl.target if kl.control == "adaptive" else None
    names = reward_names(objective.rewards)
    proxies = [name for name, reward in zip(names, objective.rewards, strict=True) if reward.weight == 0]
    return Alarms(objective.alarms, kl_limit, proxies)


def _sampler(model: Model, tokenizer: Any, sampling: Sampling, mesh: Mesh | None) -> Sampler:
    return make_sampler(model, tokenizer, sampling, mesh=mesh)


def _pool_maker(objective: Sampled, output: Path) -> Callable[[], RewardPool] | None:
    if not isinstance(objective, Rewarded):
        return None
    return partial(RewardPool, objective.rewards, memory=output / "judge.sqlite")


def _origin(run: Run) -> str:
    """Returns a digest of what answers and scores depend on, next to weights and prompts."""
    objective = run.objective
    rewards = digest(objective.rewards) if isinstance(objective, Rewarded) else ""
    parts = (env.code_digest(), objective.model_dump_json(), str(run.seed), rewards)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _shares(objective: Sampled, model: Model) -> bool:
    """Returns whether the prompt of a group is computed once.

    Raises:
        ConfigError: It is to be, in a model that cannot do it.
    """
    can_share = layout_of(model).computes_trees
    if objective.share_prompts is True and not can_share:
        raise ConfigError(
            f"{type(model).__name__} cannot share the prompts of a group.",
            where="objective.share_prompts",
            fix="--objective.share_prompts=auto",
        )
    several = isinstance(objective, OnlineDpo) or (not isinstance(objective, Raft) and objective.num_generations != 1)
    return objective.share_prompts is not False and can_share and several
