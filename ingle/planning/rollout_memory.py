"""The memory of sampling and scoring answers, and of the answers themselves.

While answers grow, no step runs: what this takes is needed next to weights and optimizer states, not to activations.
"""

from __future__ import annotations

import math

from ingle.config.objective import rows_of
from ingle.config.policy import Rewarded, Sampled
from ingle.config.policy_rules import rows_per_iteration
from ingle.config.preference_rules import has_reference
from ingle.config.rewards import ModelReward
from ingle.config.run import Run
from ingle.planning.activations import Tapes
from ingle.planning.shape import DataShape

#: Tokens of prompts that are read together, as in :mod:`ingle.models.generation.rollout`, and the largest size of what
#: fused layers prepare for all passes, as in :mod:`ingle.kernels.attention.cached`.
_PREFILL_TOKENS, _PREPARED_BYTES = 256, 1 << 28
#: Bytes per logit of a race of the tokens, without the logit itself: on a GPU it is computed in 64 bits.
_RACE_BYTES_ON_GPU = 48
#: Tokens that reward models score together, as in :mod:`ingle.objectives.reward_models`.
_SCORED_TOKENS = 4096
#: Bytes of a token of an answer: id, mask, five figures in 32 bits, and the same again in 64 bits while they are made.
_ANSWER_BYTES = 4 + 1 + 5 * 4 + 5 * 8
#: Bytes of the key of an answer whose values are cached, and of the objects around them.
_CACHED_BYTES = 300


def sampling_bytes(run: Run, data: DataShape, tapes: Tapes, ranks: int) -> float:
    """Returns the bytes on one device while answers grow: stored keys and values, prepared layers, and logits.

    Before the first answer, passes are tried with two small stores, for each of which layers are prepared.

    Args:
        run: The run.
        data: Its data; the longest document is the longest prompt with the longest answer.
        tapes: The rules of its model.
        ranks: Ranks that share the prompts.
    """
    objective, shape, b = rows_of(run.objective), tapes.shape, tapes.dtype_bytes
    if not isinstance(objective, Sampled):
        return 0.0
    slots, longest = objective.rollout.num_slots, objective.rollout.max_new_tokens
    prompt = max(0, data.longest_document - longest)
    prompts = min(math.ceil(objective.num_prompts / ranks) * prompt, slots * prompt + _PREFILL_TOKENS)
    widths = sum(2 * layer.num_kv_heads * layer.head_dim * layer.count for layer in shape.layers)
    linears = sum(lin.num_weights * lin.count * layer.count for layer in shape.layers for lin in layer.linears)
    prepared = min(_PREPARED_BYTES, b * linears) if tapes.fused and not tapes.on_gpu else 0
    logits = slots * shape.vocab_size * (b + _RACE_BYTES_ON_GPU * tapes.on_gpu)
    return max((prompts + slots * longest) * widths * b, prepared) + prepared + logits


def scoring_bytes(run: Run, data: DataShape, tapes: Tapes) -> float:
    """Returns the bytes on one device while trained reward models score answers."""
    rewards = run.objective.rewards if isinstance(run.objective, Rewarded) else ()
    if not any(isinstance(reward, ModelReward) for reward in rewards):
        return 0.0
    tokens = max(_SCORED_TOKENS, data.longest_document)
    operations = (op for layer in tapes.shape.layers for op in tapes.layer(layer, tokens))
    stream = 2 * tapes.dtype_bytes * tapes.shape.hidden_size * tokens
    return stream + max(op.saved + op.forward for op in operations)


def answers_bytes(run: Run, data: DataShape) -> float:
    """Returns the host memory of what each rank keeps of answers: an iteration of them, or values of the reference."""
    if has_reference(run):
        return data.num_tokens * (4 + _CACHED_BYTES / max(1.0, data.mean_document))
    objective = rows_of(run.objective)
    if not isinstance(objective, Sampled):
        return 0.0
    return rows_per_iteration(objective) * (data.longest_document or data.longest) * _ANSWER_BYTES
