"""Predicts what sampled answers cost: their tokens, and the time of an iteration outside of its steps.

Answers are taken as half as long as they may be. Rewards are not predicted.
"""

from __future__ import annotations

import math

from ingle.config.objective import rows_of
from ingle.config.policy import OnlineDpo, Ppo, Sampled
from ingle.config.policy_presets import suit_policy
from ingle.config.policy_rules import reads_reference, rows_per_iteration, steps_per_iteration
from ingle.planning.cost import num_trunks
from ingle.planning.search import Option, Problem
from ingle.planning.shape import DataShape

#: Time of a pass for one token of each answer that does not depend on its size: choosing tokens, the loop.
_TOKEN_S = 4e-3


def sampled_shape(
    objective: Sampled,
    num_prompts: int,
    mean_prompt: float,
    longest_prompt: int,
    *,
    shares: bool,
    validation_tokens: int = 0,
) -> DataShape:
    """Returns the shape of the answers to all prompts, each of which is a sequence, or with ``online_dpo`` half of one.

    Answers are taken as half as long as they may be. The longest one is as long as it may be, so that memory suffices
    whatever the model answers.

    Args:
        objective: The objective.
        num_prompts: Prompts of the data.
        mean_prompt: Tokens of a prompt on average.
        longest_prompt: Tokens of the longest prompt.
        shares: Whether the model computes a prompt once for all answers to it.
        validation_tokens: Tokens of held-out prompts with the longest answers.
    """
    per_prompt = rows_per_iteration(objective) // objective.num_prompts
    answers = 2 if isinstance(objective, OnlineDpo) else 1
    most = objective.rollout.max_new_tokens
    mean, shares = (most + 1) // 2, shares and objective.share_prompts is not False
    prompts = 1 if shares else per_prompt * answers
    return DataShape(
        num_sequences=num_prompts * per_prompt,
        num_tokens=round(num_prompts * (prompts * mean_prompt + per_prompt * answers * mean)),
        longest=longest_prompt * (1 if shares else answers) + answers * most,
        longest_document=longest_prompt + most,
        mean_document=mean_prompt + mean,
        validation_tokens=validation_tokens,
        shared_prompt=longest_prompt if shares and per_prompt > 1 else 0,
        sequences_per_prompt=per_prompt if shares else 1,
    )


def rollout_s(problem: Problem, option: Option, flops_per_token: float) -> float:
    """Returns the seconds in which a run samples and evaluates the answers of an iteration; 0 if it samples none.

    Args:
        problem: The run and its devices.
        option: The strategy, with the speed of its steps.
        flops_per_token: Operations of a step per token.
    """
    run, objective = problem.run, rows_of(problem.run.objective)
    if not isinstance(objective, Sampled) or not option.tokens_per_s:
        return 0.0
    per_token = _forward_s(problem, option, flops_per_token)
    sampled = objective.num_prompts * (suit_policy(objective).num_generations or 1)
    passes = int(reads_reference(run)) + (steps_per_iteration(run) > 1 or isinstance(objective, Ppo)) * num_trunks(run)
    evaluated = passes * rows_per_iteration(objective) * problem.work.tokens
    return _sampling_s(problem, objective, per_token, objective.num_prompts, sampled) + evaluated * per_token


def validation_s(problem: Problem, option: Option, flops_per_token: float) -> float:
    """Returns the seconds of a validation; arguments as for :func:`rollout_s`.

    Of an objective that samples, it answers each held-out prompt once; otherwise it reads the held-out tokens.
    """
    data, objective = problem.data, rows_of(problem.run.objective)
    if not option.tokens_per_s:
        return 0.0
    per_token = _forward_s(problem, option, flops_per_token)
    if not isinstance(objective, Sampled):
        return data.validation_tokens * per_token
    most = objective.rollout.max_new_tokens
    prompts = round(data.validation_tokens / (_prompt_tokens(data, most) + most))
    return _sampling_s(problem, objective, per_token, prompts, prompts)


def _forward_s(problem: Problem, option: Option, flops_per_token: float) -> float:
    """Returns the seconds per token of a forward pass on all devices: a step's rate, for its operations alone."""
    return min(1.0, 2 * problem.shape.active_parameters / flops_per_token) / option.tokens_per_s


def _prompt_tokens(data: DataShape, longest_answer: int) -> float:
    """Returns the tokens of a prompt on average; answers are half as long as they may be."""
    return max(0.0, data.mean_document - (longest_answer + 1) // 2)


def _sampling_s(problem: Problem, objective: Sampled, per_token: float, num_prompts: int, num_answers: int) -> float:
    """Returns the seconds in which prompts are read and answers grow, a token of each in a pass."""
    rollout = objective.rollout
    own = math.ceil(num_answers / problem.world_size)
    rounds = math.ceil(own / rollout.num_slots) * ((rollout.max_new_tokens + 1) // 2)
    slots = min(own, rollout.num_slots)
    reading = problem.work.base_bytes / problem.device.bandwidth
    decoding = rounds * (max(reading, slots * per_token * problem.world_size) + _TOKEN_S)
    return decoding + num_prompts * _prompt_tokens(problem.data, rollout.max_new_tokens) * per_token
