"""The fidelity page: what became of every merged weight, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingle.export import wording
from ingle.export.fidelity import TensorFidelity
from ingle.wording import plural


def fidelity_page(report: Mapping[str, Any], tensors: Sequence[TensorFidelity]) -> str:
    """The page.

    Args:
        report: The content of ``fidelity.json``.
        tensors: Every merged weight.
    """
    parts = ["# What the export changed", _summary(report)]
    divergence = report["divergence"]
    if divergence is not None:
        parts.append(
            "\n".join(
                [
                    "| measured on text | |",
                    "|---|---|",
                    f"| tokens compared | {divergence['num_tokens']:,} |",
                    f"| KL divergence, export from trained model | {divergence['kl']:.5f} nats a token |",
                    f"| same most likely token | {divergence['top1_agreement']:.2%} |",
                    f"| perplexity, trained model | {divergence['perplexity_first']:.4f} |",
                    f"| perplexity, export | {divergence['perplexity_second']:.4f} |",
                    f"| KL divergence, base from trained model | {_number(report['adapter_effect'])} nats a token |",
                ]
            )
        )
    if tensors:
        parts += ["## Merged weights", _MEANING, _table(tensors)]
    return "\n\n".join(parts) + "\n"


_MEANING = (
    "`delta / step` is the size of the trained change in quantization steps, `codes` the share of integer codes that "
    "changed, `correlation` how much of the direction of the change survived, `gain` how much of its length. The "
    "weights that lost most come first."
)


def _summary(report: Mapping[str, Any]) -> str:
    lines = [f"Type: {report['type']}.", wording.weights(report), wording.rounding(report), wording.kept(report)]
    promotion = report["promotion"]
    if promotion is not None:
        lines.append(
            f"{plural(len(promotion['types']), 'tensor')} got a wider type, for {promotion['extra_bytes']:,} bytes: "
            f"correlation {_number(promotion['before'])} -> {_number(promotion['expected'])}."
        )
    text = " ".join(line for line in lines if line is not None)
    return "\n\n".join([text, *(f"**Warning.** {warning}" for warning in report["warnings"])])


def _table(tensors: Sequence[TensorFidelity]) -> str:
    lines = ["| weight | type | delta / step | codes | correlation | gain |", "|---|---|---|---|---|---|"]
    for each in sorted(tensors, key=lambda each: -each.lost_energy):
        ratio, codes = f"{each.delta_per_step:.3g}", f"{each.codes_changed:.1%}"
        cells = (each.name, each.type, ratio, codes, f"{each.correlation:.4f}", f"{each.gain:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
