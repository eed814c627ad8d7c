"""What an export changed, in sentences: the same on the screen, in the card and in the fidelity page.

Every function reads the content of ``fidelity.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.evaluation.run.divergence import FEW_TOKENS
from ingle.export.gguf_types import AS_TRAINED
from ingle.wording import plural

#: Correlation below which less than half of the surviving change, by energy, is what was trained.
DOUBTFUL_CORRELATION = 0.7
#: Share of the adapter's effect on the base from which a loss is named, however small it is.
DOUBTFUL_SHARE = 0.5


def weights(report: Mapping[str, Any]) -> str:
    """How many weights were merged, copied and converted."""
    merged, copied, total = report["num_merged"], report["num_copied"], report["num_tensors"]
    converted = total - merged - copied
    parts = [
        f"{merged} merged with the adapter" if merged else "",
        f"{copied} copied byte for byte" if copied else "",
        f"{converted} written as {report['type']}" if converted else "",
    ]
    return f"{plural(total, 'tensor')}: {', '.join(part for part in parts if part)}."


def rounding(report: Mapping[str, Any]) -> str | None:
    """What ``as-trained`` does to merged weights; None where nothing was merged into a packed type."""
    packed = any(tensor["type"] not in ("f32", "float32") for tensor in report["tensors"])
    if report["type"] != AS_TRAINED or not packed:
        return None
    return (
        "`as-trained` keeps the type of every tensor, not the exact values: the merged weights are rounded to that "
        "type again."
    )


def kept(report: Mapping[str, Any]) -> str | None:
    """What the rounding left of the trained change; None where nothing was merged."""
    correlation = report["mean_correlation"]
    if correlation is None:
        return None
    return (
        f"Trained change after rounding: correlation {correlation:.3f} with the change before it, over "
        f"{plural(report['num_merged'], 'merged tensor')} (1 = all of it is left, 0 = nothing)."
    )


def divergence(report: Mapping[str, Any]) -> str | None:
    """How far the written model's predictions are from the trained one's; None where that was not measured."""
    found = report["divergence"]
    if found is None:
        return None
    return (
        f"Against the trained model, on {plural(found['num_tokens'], 'token')}: KL divergence {found['kl']:.4f} nats a "
        f"token, the same most likely token in {100 * found['top1_agreement']:.1f} %, perplexity "
        f"{found['perplexity_second']:.3f} (trained: {found['perplexity_first']:.3f})."
    )


def doubts(report: Mapping[str, Any], remedies: str, *, rounded_in_training: bool) -> list[str]:
    """Why an export that is accepted may still be a bad one.

    Args:
        report: The content of ``fidelity.json``.
        remedies: What to use instead.
        rounded_in_training: Training went through this very rounding, so that nothing more is lost by it.
    """
    found = report["divergence"]
    told = []
    if found is not None and found["num_tokens"] < FEW_TOKENS:
        told.append(
            f"The loss was measured on only {plural(found['num_tokens'], 'token')}, so its figures are rough. "
            f"Measure it on at least {FEW_TOKENS:,}: --data FILE."
        )
    if rounded_in_training:
        return told
    correlation, effect = report["mean_correlation"], report["adapter_effect"]
    if correlation is not None and correlation < DOUBTFUL_CORRELATION:
        told.append(
            f"Rounding to {report['type']} left little of the trained change: its correlation with the change before "
            f"rounding is {correlation:.3f} over {plural(report['num_merged'], 'merged tensor')}, where 1 is all and 0 "
            f"is nothing. {_why_accepted(report)} Better: {remedies}."
        )
    elif found is not None and effect and found["kl"] > DOUBTFUL_SHARE * effect:
        told.append(
            f"The export moves the predictions by {found['kl']:.4f} nats a token; training had moved the base by "
            f"{effect:.4f}. Most of what was trained may be lost. Better: {remedies}."
        )
    return told


def _why_accepted(report: Mapping[str, Any]) -> str:
    found, effect, limits = report["divergence"], report["adapter_effect"], report["limits"]
    if found is None:
        least = limits["min_correlation_without_text"]
        if report["mean_correlation"] < least:
            return "It was written because of --allow-loss."
        return f"It is accepted because that is above {least:g}; --data FILE measures what it means on text."
    if found["kl"] > limits["max_kl"]:
        return "It was written because of --allow-loss."
    text = f"It is accepted because the predictions move by {found['kl']:.4f} nats a token (the limit is "
    text += f"{limits['max_kl']:g})"
    if effect is None:
        return f"{text}."
    if found["kl"] > DOUBTFUL_SHARE * effect:
        return f"{text}; but training moved the base by only {effect:.4f}, so most of what was trained may be lost."
    return f"{text}; training moved the base by {effect:.4f}."
