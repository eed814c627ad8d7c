"""Distillation: the divergence of a student's predictions from a teacher's at every token of an answer.

The teacher is another model with the same vocabulary. It runs next to the student, without gradients, and only its last
hidden states are kept until the divergence is computed.

Legend: N tokens of the row, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ingle.adapters import BaseIdentity
from ingle.config.policy import Distill
from ingle.data.batch import Batch
from ingle.data.types import IGNORE_INDEX, Tokenizer
from ingle.errors import ModelError
from ingle.kernels.layers.divergence import Predictions, linear_divergence
from ingle.kernels.layers.logits import LogitTransform
from ingle.models import Head, Model, forward_hidden, head, kind_of, num_tokens, through_head
from ingle.objectives.driver import DocumentLoss
from ingle.objectives.interface import OpenModel, Sums
from ingle.objectives.token_loss import sum_documents


class DivergenceLoss(DocumentLoss):
    """Sum of the generalized Jensen-Shannon divergences from the teacher over the supervised tokens, in nats.

    Both models predict at the temperature of ``rollout``.

    Args:
        model: The student.
        config: The objective.
        tokenizer: The student's tokenizer, whose vocabulary the teacher must have.
    """

    unit = "completion_tokens"

    def __init__(self, model: Model, config: Distill, tokenizer: Tokenizer) -> None:
        super().__init__(model)
        self._config, self._tokenizer = config, tokenizer
        self.__dict__["_teacher"] = None  # neither trained nor sharded with the student

    def load_parts(self, identity: BaseIdentity | None, open_model: OpenModel) -> None:
        """Loads the teacher.

        Raises:
            ModelError: It cannot be opened, is no causal language model, or has another vocabulary.
        """
        opened = open_model(self._config.teacher)
        teacher: Any = opened.model
        where = f"objective.teacher = {self._config.teacher}"
        if kind_of(teacher.config) != "causal":
            raise ModelError("The teacher is no causal language model.", where=where, fix="name one")
        own, other = self._tokenizer.get_vocab(), opened.tokenizer.get_vocab()
        if own != other:
            differing = len(own.items() ^ other.items())
            raise ModelError(
                "The teacher has another vocabulary than the student.",
                where=where,
                why=f"{differing:,} entries differ between {len(own):,} tokens and {len(other):,} of the teacher",
                fix="name a teacher of the same family: probabilities are compared token by token, and methods for "
                "different vocabularies (such as GOLD) are not supported",
            )
        self.__dict__["_teacher"] = teacher.eval().requires_grad_(False)

    def compute(self, batch: Batch) -> Sums:
        """Returns the sum over all supervised tokens."""
        divergences_N = self._divergences(batch)
        return Sums({"loss": divergences_N.sum()})

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the sum of each document in nats, and the number of its supervised tokens; float64 [D, 2]."""
        return sum_documents(self._divergences(batch), batch.next_labels() != IGNORE_INDEX, batch)

    def _divergences(self, batch: Batch) -> Tensor:
        """Returns the divergence at each position that predicts a supervised token, float32 [N]; 0 elsewhere."""
        teacher = self.__dict__["_teacher"]
        assert teacher is not None, "load_parts comes first"
        with torch.no_grad():
            expected_NG = forward_hidden(teacher, batch)[0]
            theirs = head(teacher)
        size = min(num_tokens(self.model), num_tokens(teacher))  # output layers may have more rows than tokens
        temperature = self._config.rollout.temperature
        compare = partial(_compare, theirs, expected_NG, size=size, beta=self._config.beta, temperature=temperature)
        return through_head(self.model, compare, forward_hidden(self.model, batch)[0], batch.next_labels())


def _compare(
    theirs: Head,
    expected_NG: Tensor,
    own: Head,
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    size: int,
    beta: float,
    temperature: float,
) -> Tensor:
    student, teacher = (
        Predictions(
            states,
            output.weight[:size],
            None if output.bias is None else output.bias[:size],
            LogitTransform(output.logit_scale, output.softcap).at(temperature),
        )
        for states, output in ((hidden_NH, own), (expected_NG, theirs))
    )
    return linear_divergence(student, teacher, targets_N, beta)
