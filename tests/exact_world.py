"""A world in which every expectation is a sum: 3 tokens, answers of 3 tokens, so 27 answers.

The policy is a table of logits for each of the 13 prefixes. Gradients of expectations are therefore exact, in float64,
and estimators are compared with them without sampling.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ingle.objectives.policy_losses import Rows

NUM_TOKENS = 3
LENGTH = 3
#: All answers.
ANSWERS = list(itertools.product(range(NUM_TOKENS), repeat=LENGTH))
LENGTHS = np.full(len(ANSWERS), LENGTH)

#: An answer, and the prefix before each of its tokens.
_TOKENS = torch.tensor(ANSWERS)
_PREFIXES = [prefix for length in range(LENGTH) for prefix in itertools.product(range(NUM_TOKENS), repeat=length)]
BEFORE = torch.tensor([[_PREFIXES.index(answer[:length]) for length in range(LENGTH)] for answer in ANSWERS])


def table(phase: float) -> Tensor:
    """Returns logits for each prefix, [13, 3]: the policy is at 0, the reference at 2, another sampler at 0.3."""
    rows, columns = torch.meshgrid(torch.arange(13.0), torch.arange(3.0), indexing="ij")
    return torch.sin(1.7 * rows.double() + 0.9 * columns.double() + phase)


def reward(answer: Sequence[int]) -> float:
    """Returns the reward of an answer; every step matters to it."""
    return float(answer[0] == answer[2]) + 0.5 * (answer[1] == 2) - 0.25 * answer[0]


REWARDS = np.array([reward(answer) for answer in ANSWERS])


def logps(logits: Tensor) -> Tensor:
    """Returns the log-probability of each token of each answer, [27, 3]."""
    return logits.log_softmax(-1)[BEFORE, _TOKENS]


def probabilities(logits: Tensor) -> Tensor:
    """Returns the probability of each answer, [27]."""
    return logps(logits).sum(1).exp()


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Returns the gradient of a function of the logits, [13, 3]."""
    leaf = logits.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf), leaf)
    return result


def expected_reward(logits: Tensor) -> Tensor:
    """Returns J, the mean reward of the policy."""
    return probabilities(logits) @ torch.from_numpy(REWARDS)


def answer_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Returns KL(policy || reference) of whole answers."""
    return (probabilities(logits) * (logps(logits) - logps(reference)).sum(1)).sum()


def values(logits: Tensor) -> np.ndarray:
    """Returns the true value before each token of each answer, [27, 3]: the mean reward of what can follow."""
    weights = probabilities(logits)
    follows = (BEFORE[:, None] == BEFORE[None]) * weights[None, :, None]  # [27, 27, 3]
    return ((follows * torch.from_numpy(REWARDS)[None, :, None]).sum(1) / follows.sum(1)).numpy()


def draws(sampler: Tensor, number: int) -> tuple[np.ndarray, Tensor]:
    """Returns every draw of ``number`` answers from a policy, [draws, number], and the probability of each."""
    chosen = np.array(list(itertools.product(range(len(ANSWERS)), repeat=number)))
    return chosen, probabilities(sampler)[chosen].prod(1)


def rows_of(number: int) -> Rows:
    """Returns answers of 3 tokens that lie end to end; all tokens count."""
    documents = torch.arange(number).repeat_interleave(LENGTH)
    return Rows(torch.ones(len(documents), dtype=torch.bool), documents, number)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the distance of two gradients, relative to the second."""
    return float((found - expected).norm() / expected.norm())
