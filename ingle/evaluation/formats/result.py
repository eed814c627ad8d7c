"""What was measured of one format on one model and one text, and its statistics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ingle.evaluation.run.divergence import Predictions
from ingle.evaluation.statistics.intervals import bootstrap, wilson
from ingle.evaluation.statistics.significance import Floats

#: Draws of the bootstrap intervals.
_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where one window tells nothing about spread."""

    value: float
    low: float | None
    high: float | None

    @property
    def upper(self) -> float:
        """The far end of the interval, or the figure itself."""
        return self.value if self.high is None else self.high


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts the text.

    Attributes:
        perplexity: Of the text.
        loss: What was lost: mean rise of a token's negative log-likelihood over the unpacked model's, in nats; the
            logarithm of the ratio of the two perplexities.  Tokens are compared pair by pair.
        kl: Mean Kullback-Leibler divergence of its predictions from the unpacked model's, in nats.
        kl_99: What 99 % of the tokens stay below.
        top_1: Share of tokens where both put the same token first.
    """

    perplexity: Estimate
    loss: Estimate
    kl: Estimate
    kl_99: float
    top_1: Estimate

    @classmethod
    def of(cls, predictions: Predictions) -> Quality:
        """The statistics of a comparison with the unpacked model.

        Windows are what is drawn again for the intervals: tokens of one window depend on one another.
        """
        rises = predictions.nll - predictions.reference_nll
        num_tokens = len(predictions.nll)
        agreed = wilson(int(predictions.agrees.sum()), num_tokens)
        return cls(
            perplexity=_estimate(predictions.by_window(predictions.nll), exponential=True),
            loss=_estimate(predictions.by_window(rises)),
            kl=_estimate(predictions.by_window(predictions.kl)),
            kl_99=float(np.quantile(predictions.kl, 0.99)),
            top_1=Estimate(float(predictions.agrees.mean()), agreed.low, agreed.high),
        )


@dataclass(frozen=True, slots=True)
class FormatResult:
    """One row of the table.

    Attributes:
        name: What ``ingle quantize --to`` calls the format.
        container: ``gguf`` or ``safetensors``; empty for the model as it is.
        types: Weights held in each type.
        size_bytes: Of all tensors in the file.
        bits_per_weight: The same over the number of weights.
        memory_bytes: What the weights take while Ingle runs them, the largest decoded layer included.
        decode_weights_per_s: Quantized weights decoded a second; None where nothing is packed.
        encode_s: Time to pack the model.
        quality: How well it predicts.
    """

    name: str
    container: str
    types: dict[str, int]
    size_bytes: int
    bits_per_weight: float
    memory_bytes: int
    decode_weights_per_s: float | None
    encode_s: float
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FormatResult:
        """What :meth:`to_dict` gave."""
        quality: dict[str, Any] = {
            key: Estimate(**value) if isinstance(value, dict) else value for key, value in data["quality"].items()
        }
        return cls(**{**data, "quality": Quality(**quality)})


def _estimate(statistics_W2: Floats, *, exponential: bool = False) -> Estimate:
    def mean(totals: Floats) -> Floats:
        ratio = totals[..., 0] / totals[..., 1]
        return np.asarray(np.exp(np.minimum(ratio, 100.0))) if exponential else ratio

    value = float(mean(statistics_W2.sum(0)[None])[0])
    if len(statistics_W2) < 2:
        return Estimate(value, None, None)
    interval = bootstrap(statistics_W2, mean, num_resamples=_RESAMPLES)
    return Estimate(value, interval.low, interval.high)
