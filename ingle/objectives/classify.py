"""Classification of documents: one class, several classes, or a number.

Legend: D documents, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ingle.data.batch import Batch
from ingle.data.counters import Place
from ingle.data.types import Sample
from ingle.models import Model
from ingle.objectives.head_loss import HeadLoss

Problem = Literal["single", "multi", "regression"]


class ClassLoss(HeadLoss):
    """Cross-entropy for one class, binary cross-entropy for several, squared error for numbers.

    Args:
        model: A model with a classification head.
        problem: What is predicted.
        label_smoothing: Share of the probability that the target gives to all classes alike.
    """

    unit = "documents"

    def __init__(self, model: Model, problem: Problem, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self._problem, self._label_smoothing = problem, label_smoothing

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss of each document and its weight; float64 [D, 2]."""
        losses_D = self.losses(batch).double()
        return torch.stack([losses_D, self._weights(batch).double()], 1)

    def count(self, batch: Batch) -> float:
        """Returns the number of documents; of outputs, where each has its own loss; or the weights of the classes."""
        if "document_weights" in batch.columns:
            return float(self._weights(batch).sum())
        return float(batch.num_documents * self._num_outputs(batch))

    def losses(self, batch: Batch) -> Tensor:
        """Returns the weighted loss of each document, [D]."""
        logits_DC = self.outputs(batch)[: batch.num_documents]
        labels = _labels(batch)
        if self._problem == "single":
            losses_D = functional.cross_entropy(
                logits_DC, labels.long(), reduction="none", label_smoothing=self._label_smoothing
            )
        else:
            labels_DC = labels.reshape(logits_DC.shape).to(logits_DC.dtype)
            loss = functional.mse_loss if self._problem == "regression" else functional.binary_cross_entropy_with_logits
            losses_D = loss(logits_DC, labels_DC, reduction="none").sum(1)
        weights = batch.columns.get("document_weights")
        return losses_D if weights is None else losses_D * weights[: batch.num_documents].to(losses_D.dtype)

    def _weights(self, batch: Batch) -> Tensor:
        weights = batch.columns.get("document_weights")
        if weights is not None:
            return weights[: batch.num_documents]
        return torch.full((batch.num_documents,), float(self._num_outputs(batch)), device=batch.cu_seqlens.device)

    def _num_outputs(self, batch: Batch) -> int:
        labels = _labels(batch)
        return 1 if self._problem == "single" or labels.dim() == 1 else labels.shape[1]


def _labels(batch: Batch) -> Tensor:
    return batch.columns["document_labels"][: batch.num_documents]


class ClassWeights:
    """Gives each document the weight of its class.

    Args:
        weights_C: Weights of the classes.
    """

    def __init__(self, weights_C: Sequence[float] | npt.NDArray[np.float64]) -> None:
        self._weights_C = np.asarray(weights_C, np.float32)

    def __call__(self, samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
        """Returns the documents with their weights."""
        return [replace(sample, columns={**sample.columns, **self._weight(sample)}) for sample in samples]

    def _weight(self, sample: Sample) -> dict[str, npt.NDArray[np.float32]]:
        return {"document_weights": self._weights_C[sample.columns["document_labels"].astype(np.int64)]}


def balanced_weights(counts_C: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns weights inverse to the frequency of each class; their mean over documents is 1.

    Source: ``compute_class_weight`` of scikit-learn.
    """
    present = max(int((counts_C > 0).sum()), 1)
    return np.where(counts_C > 0, counts_C.sum() / (present * np.maximum(counts_C, 1)), 0.0)
