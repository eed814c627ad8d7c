"""Chooses the next token of each row of a batch.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Below this, sampling gives the most likely token anyway, and dividing logits by it would overflow.
_LEAST_TEMPERATURE = 1e-6


class TokenSampler:
    """Chooses tokens greedily, or at random with a random stream for each prompt.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: Sample from the most likely tokens that together reach this probability.
        seed: Sampling seed.
        indices: Index of the prompt in each row; its random numbers depend only on seed and index.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, indices: Sequence[int]) -> None:
        self._temperature = max(temperature, _LEAST_TEMPERATURE)
        self._top_p = top_p
        self._rngs = [np.random.default_rng([seed, index]) for index in indices] if temperature > 0 else None

    def choose(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the next token of each row, ``[B]``; each call draws one random number per row.

        Tokens are sorted by falling probability, and the first whose cumulative probability exceeds the random number
        is chosen. The number is scaled to the total probability of the kept tokens, so ``top_p`` needs no
        renormalization.
        """
        if self._rngs is None:
            return logits_BV.argmax(-1)
        probabilities_BV = (logits_BV / self._temperature).softmax(-1, dtype=torch.float64)
        sorted_BV, tokens_BV = torch.sort(probabilities_BV, dim=-1, descending=True, stable=True)
        reached_BV = sorted_BV.cumsum(-1)
        kept_B = ((reached_BV - sorted_BV) < self._top_p).sum(-1, keepdim=True)
        mass_B = reached_BV.gather(-1, kept_B - 1)
        numbers = torch.tensor([self._rngs[row].random() for row in rows], dtype=torch.float64)
        uniform_B = numbers.to(logits_BV.device)[:, None]
        place_B = torch.searchsorted(reached_BV, uniform_B * mass_B, right=True).minimum(kept_B - 1)
        return tokens_BV.gather(-1, place_B)[:, 0]
