"""The fidelity report: what an export changed, as JSON, as a page and in sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ingle.evaluation.run.divergence import FEW_TOKENS, Divergence
from ingle.export.fidelity.measurement import TensorFidelity, mean_correlation
from ingle.export.fidelity.promotion import Promotion
from ingle.export.writers.gguf_types import AS_TRAINED
from ingle.wording import plural

#: Largest accepted KL divergence of the exported model from the trained one, nats per token: above the cost of Q3_K_M
#: for a model with eight billion weights (0.10), well below that of Q2_K (0.45).
MAX_KL = 0.15
#: Smallest accepted mean correlation if there is no text to measure on.
MIN_CORRELATION = 0.5
#: Below this mean correlation, less than half of the energy of the surviving change comes from training.
DOUBTFUL_CORRELATION = 0.7
#: Share of the adapter's effect on the base from which a loss causes a warning, however small it is.
DOUBTFUL_SHARE = 0.5

_LEGEND = (
    "`delta / step` is the size of the trained change in quantization steps, `codes` is the share of integer codes "
    "that changed, `correlation` is how much of the direction of the change survived, and `gain` is how much of its "
    "length. The weights that lost most come first."
)


@dataclass(frozen=True)
class FidelityReport:
    """What an export changed.

    Attributes:
        type: Type of the weights.
        num_tensors: Number of tensors.
        num_copied: Number of tensors copied byte for byte.
        tensors: Fidelity of every merged tensor.
        divergence: Divergence of the exported model from the trained one on text; None if it was not measured.
        adapter_effect: KL divergence of the base from the trained model on the same text, nats per token.
        max_kl: Largest accepted KL divergence.
        promotion: Result of ``--promote``.
        warnings: Reasons why an accepted export may still be bad.
    """

    type: str
    num_tensors: int
    num_copied: int
    tensors: tuple[TensorFidelity, ...]
    divergence: Divergence | None = None
    adapter_effect: float | None = None
    max_kl: float = MAX_KL
    promotion: Promotion | None = None
    warnings: tuple[str, ...] = ()

    @property
    def mean_correlation(self) -> float | None:
        """Mean correlation over all merged tensors; None if nothing was merged."""
        return mean_correlation(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``fidelity.json``."""
        return {
            "type": self.type,
            "num_tensors": self.num_tensors,
            "num_copied": self.num_copied,
            "num_merged": len(self.tensors),
            "mean_correlation": self.mean_correlation,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "adapter_effect": self.adapter_effect,
            "limits": {"max_kl": self.max_kl, "min_correlation_without_text": MIN_CORRELATION},
            "promotion": None if self.promotion is None else asdict(self.promotion),
            "tensors": [each.to_dict() for each in self.tensors],
            "warnings": list(self.warnings),
        }

    def to_markdown(self) -> str:
        """Returns the content of ``fidelity.md``."""
        sentences = [f"Type: {self.type}.", *self.describe_weights()]
        if self.promotion is not None:
            sentences.append(
                f"{plural(len(self.promotion.types), 'tensor')} got a wider type, for {self.promotion.extra_bytes:,} "
                f"more bytes: correlation {_number(self.promotion.before)} -> {_number(self.promotion.expected)}."
            )
        parts = ["# What the export changed", " ".join(sentences)]
        parts += [f"**Warning.** {warning}" for warning in self.warnings]
        found = self.divergence
        if found is not None:
            parts.append(
                "| measured on text | |\n|---|---|\n"
                f"| tokens compared | {found.num_tokens:,} |\n"
                f"| KL divergence, export from trained model | {found.kl:.5f} nats per token |\n"
                f"| same most likely token | {found.top1_agreement:.2%} |\n"
                f"| perplexity, trained model | {found.perplexity_first:.4f} |\n"
                f"| perplexity, export | {found.perplexity_second:.4f} |\n"
                f"| KL divergence, base from trained model | {_number(self.adapter_effect)} nats per token |"
            )
        if self.tensors:
            rows = [
                f"| {each.name} | {each.type} | {each.delta_per_step:.3g} | {each.codes_changed:.1%} "
                f"| {each.correlation:.4f} | {each.gain:.3f} |"
                for each in sorted(self.tensors, key=lambda each: -each.lost_energy)
            ]
            head = "| weight | type | delta / step | codes | correlation | gain |\n|---|---|---|---|---|---|"
            parts += ["## Merged weights", _LEGEND, "\n".join([head, *rows])]
        return "\n\n".join(parts) + "\n"

    def describe_weights(self) -> list[str]:
        """Returns sentences about merged, copied and converted tensors, and what rounding left of the change."""
        merged = len(self.tensors)
        converted = self.num_tensors - merged - self.num_copied
        parts = [
            f"{merged} merged with the adapter" if merged else "",
            f"{self.num_copied} copied byte for byte" if self.num_copied else "",
            f"{converted} written as {self.type}" if converted else "",
        ]
        sentences = [f"{plural(self.num_tensors, 'tensor')}: {', '.join(part for part in parts if part)}."]
        if self.type == AS_TRAINED and any(each.type not in ("f32", "float32") for each in self.tensors):
            sentences.append(
                "`as-trained` keeps the type of every tensor, not the exact values: merged weights are rounded to "
                "that type again."
            )
        correlation = self.mean_correlation
        if correlation is not None:
            sentences.append(
                f"Trained change after rounding: correlation {correlation:.3f} with the change before it, over "
                f"{plural(merged, 'merged tensor')} (1 = all of it is left, 0 = nothing)."
            )
        return sentences

    def describe_divergence(self) -> str | None:
        """Returns a sentence about the divergence on text; None if it was not measured."""
        found = self.divergence
        if found is None:
            return None
        return (
            f"Compared with the trained model on {plural(found.num_tokens, 'token')}: KL divergence {found.kl:.4f} "
            f"nats per token, the same most likely token in {100 * found.top1_agreement:.1f} %, perplexity "
            f"{found.perplexity_second:.3f} (trained: {found.perplexity_first:.3f})."
        )

    def explain_refusal(self, *, rounded_in_training: bool) -> str | None:
        """Returns why the export loses too much; None if it is acceptable.

        Args:
            rounded_in_training: Whether training already used this rounding, so that it loses nothing more.
        """
        found, correlation = self.divergence, self.mean_correlation
        if found is not None:
            if found.kl <= self.max_kl:
                return None
            why = (
                f"the KL divergence from the trained model is {found.kl:.3f} nats per token, measured on "
                f"{plural(found.num_tokens, 'token')}; at most {self.max_kl:g} is accepted\n"
                f"the same token is most likely in {found.top1_agreement:.1%}"
            )
            effect = self.adapter_effect
            why += "" if effect is None else f"\ntraining moved the base by {effect:.3f} nats per token"
        elif correlation is None or correlation >= MIN_CORRELATION or rounded_in_training:
            return None
        else:
            why = (
                f"after rounding, the trained change has a correlation of {correlation:.2f} with the change before; at "
                f"least {MIN_CORRELATION:g} is accepted if there is no text to measure on (--data FILE)"
            )
        if self.tensors:
            worst = max(self.tensors, key=lambda each: each.lost_energy)
            why += (
                f"\n{worst.name} loses most: correlation {worst.correlation:.2f}; the change is "
                f"{worst.delta_per_step:.2f} quantization steps"
            )
        return why

    def find_doubts(self, remedies: str, *, rounded_in_training: bool) -> list[str]:
        """Returns reasons why an accepted export may still be bad.

        Args:
            remedies: Options to use instead.
            rounded_in_training: Whether training already used this rounding, so that it loses nothing more.
        """
        found, correlation, effect = self.divergence, self.mean_correlation, self.adapter_effect
        doubts = []
        if found is not None and found.num_tokens < FEW_TOKENS:
            doubts.append(
                f"The loss was measured on only {plural(found.num_tokens, 'token')}, so its figures are rough. "
                f"Measure it on at least {FEW_TOKENS:,}: --data FILE."
            )
        if rounded_in_training:
            return doubts
        if correlation is not None and correlation < DOUBTFUL_CORRELATION:
            doubts.append(
                f"Rounding to {self.type} left little of the trained change: its correlation with the change before "
                f"rounding is {correlation:.3f} over {plural(len(self.tensors), 'merged tensor')}, where 1 is all and "
                f"0 is nothing. {self._explain_acceptance(correlation)} Better: {remedies}."
            )
        elif found is not None and effect and found.kl > DOUBTFUL_SHARE * effect:
            doubts.append(
                f"The export moves the predictions by {found.kl:.4f} nats per token; training had moved the base by "
                f"{effect:.4f}. Most of what was trained may be lost. Better: {remedies}."
            )
        return doubts

    def _explain_acceptance(self, correlation: float) -> str:
        found, effect = self.divergence, self.adapter_effect
        if found is None:
            if correlation < MIN_CORRELATION:
                return "It was written because of --allow-loss."
            return f"It is accepted because that is above {MIN_CORRELATION:g}; --data FILE measures its effect on text."
        if found.kl > self.max_kl:
            return "It was written because of --allow-loss."
        text = f"It is accepted because the predictions move by {found.kl:.4f} nats per token "
        text += f"(the limit is {self.max_kl:g})"
        if effect is None:
            return f"{text}."
        if found.kl > DOUBTFUL_SHARE * effect:
            return f"{text}, but training moved the base by only {effect:.4f}, so most of it may be lost."
        return f"{text}; training moved the base by {effect:.4f}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
