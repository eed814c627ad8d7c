"""The model card: what was trained on what, how good it is, and what the export did to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ingle import __version__
from ingle.atomic import sha256
from ingle.config.loader import run_to_yaml
from ingle.config.run import Run
from ingle.export import wording

_TITLES = {
    "peft": "LoRA adapter in PEFT's layout",
    "safetensors": "merged model, safetensors",
    "gguf": "merged model, GGUF",
    "gguf-adapter": "LoRA adapter, GGUF",
}


def make_card(
    *,
    to: str,
    type_name: str | None,
    base_model: str,
    licence: str | None,
    run: Run | None,
    run_folder: Path | None,
    usage: str,
    report: Mapping[str, Any] | None,
    report_name: str,
) -> str:
    """The model card, Markdown.

    Args:
        to: What was exported.
        type_name: The type of its weights.
        base_model: Id of the base.
        licence: Of the base, None when unknown.
        run: The config it was trained with, None for a model that no run made.
        run_folder: Where that run lies.
        usage: How to use it, Markdown.
        report: What the export changed, the content of ``fidelity.json``; None where nothing was merged or packed.
        report_name: The name of that file.
    """
    head: dict[str, Any] = {
        "base_model": base_model,
        "license": licence or "other",
        "tags": ["ingle", *(["lora"] if to in ("peft", "gguf-adapter") else []), *(["gguf"] if "gguf" in to else [])],
    }
    if to == "peft":
        head["library_name"] = "peft"
    elif to == "safetensors":
        head["library_name"] = "transformers"
    title = f"{Path(base_model).name}, {_TITLES[to]}" + (f" ({type_name})" if type_name else "")
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---", f"# {title}"]
    made = f"Made with Ingle {__version__} from `{base_model}`."
    if licence is None:
        made += " Its licence could not be read; the licence of the base model applies."
    parts += [made, "## Use", usage]
    scores = _read_report(run_folder)
    if scores.get("metrics"):
        parts += ["## How good it is", _metrics(scores)]
    if report is not None:
        parts += ["## What the export changed", *_changes(report, report_name)]
    if run is not None:
        parts += ["## Data", _data(run, run_folder), "## Config", f"```yaml\n{run_to_yaml(run).strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def read_licence(folder: Path) -> str | None:
    """The licence that a model folder's card names."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if match is None:
        return None
    try:
        head = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def _read_report(run_folder: Path | None) -> dict[str, Any]:
    try:
        report: Any = {} if run_folder is None else json.loads((run_folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _metrics(report: Mapping[str, Any]) -> str:
    lines = ["| metric | base | tuned | difference | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for name, row in report["metrics"].items():
        low, high = (_number(end) for end in row["ci95"])
        lines.append(
            f"| {name} | {_number(row['base'])} | {_number(row['tuned'])} | {_number(row['delta'])} "
            f"| {low} to {high} | {row['n']} |"
        )
    return "\n".join(
        [
            "\n".join(lines),
            "",
            f"{report['verdict']} Measured on the trained model, before the export.",
        ]
    )


def _changes(report: Mapping[str, Any], name: str) -> list[str]:
    """Paragraphs."""
    sentences = (wording.weights(report), wording.rounding(report), wording.kept(report), wording.divergence(report))
    text = " ".join(sentence for sentence in sentences if sentence is not None)
    return [f"{text} `{name}` has every figure.", *(f"**Warning.** {warning}" for warning in report["warnings"])]


def _data(run: Run, run_folder: Path | None) -> str:
    lines = ["| source | SHA-256 |", "|---|---|"]
    for source in run.data.sources:
        path = Path(source.path)
        digest = sha256(path) if path.is_file() else "not a single local file"
        lines.append(f"| {path.name} | `{digest}` |")
    states = [] if run_folder is None else sorted(run_folder.glob("checkpoints/step-*/state.json"))
    if states:
        state = json.loads(states[-1].read_text(encoding="utf-8"))
        lines += ["", f"SHA of the tokenized data: `{state['data_hash']}`."]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
