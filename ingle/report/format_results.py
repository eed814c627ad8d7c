"""Typed results of a format survey, which are the content of ``formats.json``, and their figures as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ingle.wording import plural, size


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and its 95 % interval; the ends are None if a single window gives no spread."""

    value: float
    low: float | None
    high: float | None

    @property
    def lower(self) -> float:
        """The lower end of the interval, or the figure itself."""
        return self.value if self.low is None else self.low

    @property
    def upper(self) -> float:
        """The upper end of the interval, or the figure itself."""
        return self.value if self.high is None else self.high


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of a quantized model's predictions, compared with the unquantized model.

    Attributes:
        perplexity: Perplexity of the text.
        loss: Mean rise of a token's negative log-likelihood in nats, which is the logarithm of the ratio of the two
            perplexities. Tokens are compared pair by pair.
        kl: Mean Kullback-Leibler divergence from the unquantized model's predictions, in nats per token.
        kl_99: The 99th percentile of the divergence over tokens.
        top_1: Share of tokens for which both models rank the same token first.
    """

    perplexity: Figure
    loss: Figure
    kl: Figure
    kl_99: float
    top_1: Figure


@dataclass(frozen=True, slots=True)
class FormatResult:
    """One row of the table.

    Attributes:
        name: The format, as ``ingle quantize --to`` takes it; ``none`` for the unquantized model.
        container: ``gguf`` or ``safetensors``; empty for the unquantized model.
        types: Number of weights stored in each type.
        size_bytes: Size of all tensors in the file.
        bits_per_weight: Mean over all weights.
        memory_bytes: Size of the weights while Ingle runs them, including the largest decoded layer.
        decode_weights_per_s: Decoding speed of the linear layers; None for the unquantized model.
        encode_s: Time to quantize the model.
        quality: Quality of its predictions.
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


@dataclass(frozen=True, slots=True)
class Subject:
    """Model and text of a survey; ``fingerprint`` is a hash of everything that affects the figures."""

    model: str
    data: str
    imatrix: str | None
    dtype: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The recommended format (None if none was measured), whether it stays within the limit, and why it is this one."""

    name: str | None
    within: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Advice:
    """Common advice on formats, the figures measured here, and whether they support it (``open``: not measured)."""

    claim: str
    measured: str
    verdict: Literal["yes", "no", "in part", "open"]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A format that cannot store this model, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class FormatReport:
    """The result of a survey.

    Attributes:
        schema: Version of this layout and of how the figures are computed.
        status: ``finished``.
        subject: What was measured.
        num_tokens: Scored tokens.
        num_windows: Windows of the text.
        limit: Largest divergence of a recommended format, in nats per token.
        reference: The unquantized model.
        formats: All measured formats, smallest first.
        front: Names of the formats on the Pareto front of size and divergence, smallest first.
        recommendation: The recommended format.
        sayings: Common advice, checked against the figures.
        skipped: Formats that cannot store this model.
        warnings: Why the figures may be rough.
    """

    schema: int
    status: str
    subject: Subject
    num_tokens: int
    num_windows: int
    limit: float
    reference: FormatResult
    formats: tuple[FormatResult, ...]
    front: tuple[str, ...]
    recommendation: Recommendation
    sayings: tuple[Advice, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, as in ``formats.json``."""
        return asdict(self)

    @property
    def measured_on(self) -> str:
        """What the figures were measured on, in words."""
        text = f"{plural(self.num_tokens, 'token')} of {self.subject.data} ({plural(self.num_windows, 'window')})"
        return f"Measured on {text}, computed in {self.subject.dtype}"


def row_cells(row: FormatResult) -> dict[str, str]:
    """Returns every cell of a row of the table as text."""
    quality = row.quality
    return {
        "name": row.name,
        "container": row.container or "unquantized",
        "bits": f"{row.bits_per_weight:.2f}",
        "size": size(row.size_bytes),
        "perplexity": perplexity_text(quality.perplexity.value),
        "perplexity_ends": _ends(quality.perplexity, perplexity_text),
        "loss": _signed(quality.loss.value),
        "loss_ends": _ends(quality.loss, _signed),
        "kl": nats_text(quality.kl.value),
        "kl_ends": _ends(quality.kl, nats_text),
        "kl_99": nats_text(quality.kl_99),
        "top_1": f"{100 * quality.top_1.value:.1f} %",
        "rate": _rate(row.decode_weights_per_s),
        "memory": size(row.memory_bytes),
    }


def nats_text(nats: float) -> str:
    """Returns a divergence as text: ``0.0123``, ``1.25``, ``0``."""
    if nats == 0:
        return "0"
    return f"{nats:.4f}" if 0.001 <= abs(nats) < 1 else f"{nats:.2f}" if abs(nats) >= 1 else f"{nats:.1e}"


def perplexity_text(perplexity: float) -> str:
    """Returns a perplexity as text: ``2,116``, ``12.34``."""
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.4g}"


def _signed(nats: float) -> str:
    return "0" if nats == 0 else f"{nats:+.4f}".replace("-", "−")


def _rate(weights_per_s: float | None) -> str:
    if weights_per_s is None:
        return "–"
    return f"{weights_per_s / 1e9:.1f} G" if weights_per_s >= 5e8 else f"{weights_per_s / 1e6:.0f} M"


def _ends(figure: Figure, to_text: Callable[[float], str]) -> str:
    return "" if figure.low is None or figure.high is None else f"{to_text(figure.low)} – {to_text(figure.high)}"
