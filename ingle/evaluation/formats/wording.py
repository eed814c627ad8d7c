"""Figures of a format in words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.wording import plural, size


def measured_on(report: Mapping[str, Any]) -> str:
    """What the figures of a comparison were measured on."""
    subject = report["subject"]
    text = f"Measured on {plural(report['num_tokens'], 'token')} of {subject['data']} "
    return text + f"({plural(report['num_windows'], 'window')}), computed in {subject['dtype']}"


def row_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """One row of the table, every cell as text."""
    quality = row["quality"]
    return {
        "name": row["name"],
        "container": row["container"] or "as it is",
        "types": ", ".join(name for name, _ in sorted(row["types"].items(), key=lambda item: -item[1])),
        "bits": f"{row['bits_per_weight']:.2f}",
        "size": size(row["size_bytes"]),
        "perplexity": value(quality["perplexity"]["value"]),
        "perplexity_ends": _ends(quality["perplexity"], value),
        "loss": signed(quality["loss"]["value"]),
        "loss_ends": _ends(quality["loss"], signed),
        "kl": small(quality["kl"]["value"]),
        "kl_ends": _ends(quality["kl"], small),
        "kl_99": small(quality["kl_99"]),
        "top_1": f"{quality['top_1']['value']:.1%}".replace("%", " %"),
        "rate": rate(row["decode_weights_per_s"]),
        "memory": size(row["memory_bytes"]),
    }


def small(value: float) -> str:
    """A loss in nats: ``0.0123``, ``1.25``, ``0``."""
    if value == 0:
        return "0"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.1e}"


def signed(value: float) -> str:
    """A rise of the loss in nats: ``+0.0123``."""
    return "0" if value == 0 else f"{value:+.4f}".replace("-", "−")


def rate(weights_per_s: float | None) -> str:
    """Weights a second: ``4.2 G``."""
    if weights_per_s is None:
        return "–"
    return f"{weights_per_s / 1e9:.1f} G" if weights_per_s >= 5e8 else f"{weights_per_s / 1e6:.0f} M"


def value(perplexity: float) -> str:
    """A perplexity: ``2,116``, ``12.34``."""
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.4g}"


def _ends(figure: Mapping[str, Any], write: Any) -> str:
    return "" if figure["low"] is None else f"{write(figure['low'])} – {write(figure['high'])}"


__all__ = ["measured_on", "rate", "row_cells", "signed", "size", "small", "value"]
