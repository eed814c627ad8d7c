"""Writes the model card and the fidelity report that accompany an export."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ingle import __version__
from ingle.atomic import sha256
from ingle.config.loader import run_to_yaml
from ingle.config.run import Run
from ingle.errors import CheckpointError
from ingle.export.fidelity.fidelity_report import FidelityReport
from ingle.export.job import ExportJob
from ingle.export.output_paths import OutputPaths
from ingle.report.results import RunReport
from ingle.report.run_files import read_report

_TITLES = {
    "peft": "LoRA adapter in PEFT's layout",
    "safetensors": "merged model, safetensors",
    "gguf": "merged model, GGUF",
    "gguf-adapter": "LoRA adapter, GGUF",
}
_LIBRARIES = {"peft": "peft", "safetensors": "transformers"}


def write_companions(
    job: ExportJob,
    folder: Path,
    paths: OutputPaths,
    *,
    type_name: str | None,
    usage: str,
    report: FidelityReport | None = None,
) -> None:
    """Writes the model card and the fidelity report into ``folder`` under the names of ``paths``.

    Args:
        job: The export.
        folder: Temporary folder of the export.
        paths: Paths of the export.
        type_name: Type of the weights.
        usage: How to use the export, as Markdown.
        report: Fidelity report; None if nothing was merged or quantized.
    """
    if report is not None:
        text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / paths.name("fidelity")).write_text(text + "\n", encoding="utf-8")
        (folder / paths.name("fidelity_page")).write_text(report.to_markdown(), encoding="utf-8")
    card = make_card(job, type_name, usage, report, paths.name("fidelity"))
    (folder / paths.name("card")).write_text(card, encoding="utf-8")


def make_card(
    job: ExportJob, type_name: str | None, usage: str, report: FidelityReport | None, report_name: str
) -> str:
    """Returns the model card as Markdown; see :func:`write_companions`."""
    to, base_model, run = job.request.to, job.base_model, job.run
    license = read_license(Path(base_model))
    head: dict[str, Any] = {
        "base_model": base_model,
        "license": license or "other",
        "tags": ["ingle", *(["lora"] if to in ("peft", "gguf-adapter") else []), *(["gguf"] if "gguf" in to else [])],
    }
    if to in _LIBRARIES:
        head["library_name"] = _LIBRARIES[to]
    title = f"{Path(base_model).name}, {_TITLES[to]}" + (f" ({type_name})" if type_name else "")
    made = f"Made with Ingle {__version__} from `{base_model}`."
    if license is None:
        made += " Its license could not be read; the license of the base model applies."
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---", f"# {title}", made, "## Use", usage]
    scores = _read_scores(job.run_folder)
    if scores is not None and scores.metrics:
        parts += ["## Scores", _describe_scores(scores)]
    if report is not None:
        sentences = [*report.describe_weights(), report.describe_divergence() or ""]
        text = " ".join(sentence for sentence in sentences if sentence)
        parts += ["## What the export changed", f"{text} `{report_name}` contains every figure."]
        parts += [f"**Warning.** {warning}" for warning in report.warnings]
    if run is not None:
        parts += ["## Data", _describe_data(run, job.run_folder)]
        parts += ["## Config", f"```yaml\n{run_to_yaml(run).strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def read_license(folder: Path) -> str | None:
    """Returns the license in the model card of a folder, if there is one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        head = None if match is None else yaml.safe_load(match[1])
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    license = head.get("license") if isinstance(head, dict) else None
    return license if isinstance(license, str) else None


def _read_scores(run_folder: Path | None) -> RunReport | None:
    """Reads the report of a run; None if there is none that can be read, since the export does not depend on it."""
    try:
        return None if run_folder is None else read_report(run_folder / "report.json")
    except (OSError, CheckpointError):
        return None


def _describe_scores(report: RunReport) -> str:
    lines = [
        f"| metric | {report.base_name or 'base'} | tuned | difference | 95 % interval | n |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report.metrics.items():
        base, tuned, delta, low, high = map(_number, (row.base, row.tuned, row.delta, *row.ci95))
        lines.append(f"| {name} | {base} | {tuned} | {delta} | {low} to {high} | {row.n} |")
    return "\n".join([*lines, "", f"{report.verdict} Measured on the trained model, before the export."])


def _describe_data(run: Run, run_folder: Path | None) -> str:
    lines = ["| source | SHA-256 |", "|---|---|"]
    for source in run.data.sources:
        path = Path(source.path)
        digest = sha256(path) if path.is_file() else "not a single local file"
        lines.append(f"| {path.name} | `{digest}` |")
    for file in sorted(run_folder.glob("checkpoints/step-*/state.json"))[-1:] if run_folder is not None else ():
        # The export does not depend on the checkpoint, which may be damaged.
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            lines += ["", f"SHA-256 of the tokenized data: `{json.loads(file.read_bytes())['data_hash']}`."]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
