"""Predicts what sampled answers cost: the time of an iteration outside of its steps, and their keys and values.

Answers are taken as half as long as they may be. Rewards are not predicted.
"""

from __future__ import annotations

import math

from ingle.config.policy import Sampled
from ingle.config.policy_presets import suit_policy
from ingle.config.policy_rules import reads_reference, rows_per_iteration, steps_per_iteration
from ingle.planning.search import Option, Problem

#: Time of a pass for one token of each answer that does not depend on its size: choosing tokens, the loop.
_TOKEN_S = 4e-3


def rollout_s(problem: Problem, option: Option, flops_per_token: float) -> float:
    """Returns the seconds in which a run samples and evaluates the answers of an iteration.

    Args:
        problem: The run and its devices.
        option: The strategy, with the speed of its steps.
        flops_per_token: Operations of a step per token.
    """
    run, data = problem.run, problem.data
    if not isinstance(run.objective, Sampled) or not option.tokens_per_s:
        return 0.0
    objective = suit_policy(run.objective)
    rollout, sampled = objective.rollout, objective.num_prompts * (objective.num_generations or 1)
    # A step's rate, for the operations of a forward pass alone.
    per_token = min(1.0, 2 * problem.shape.active_parameters / flops_per_token) / option.tokens_per_s
    answer = (rollout.max_new_tokens + 1) // 2
    prompts = objective.num_prompts * max(0.0, data.mean_document - answer)
    own = math.ceil(sampled / problem.world_size)
    rounds = math.ceil(own / rollout.num_slots) * answer
    slots = min(own, rollout.num_slots)
    reading = problem.work.base_bytes / problem.device.bandwidth
    decoding = rounds * (max(reading, slots * per_token * problem.world_size) + _TOKEN_S)
    passes = int(reads_reference(run)) + int(steps_per_iteration(run) > 1 or objective.kind == "ppo")
    return decoding + (prompts + passes * rows_per_iteration(objective) * data.mean_document) * per_token
