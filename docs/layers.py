"""Draws the layers of the packages from the import contracts in ``pyproject.toml``."""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Short labels under the names in the picture.
SUBTITLES = {
    "cli": "commands",
    "flow": "a run, from data to report",
    "prediction": "labels, tags, answers",
    "studies": "ranks and methods",
    "margins": "pairs under a model",
    "launch": "ranks, SLURM, Ray",
    "run_evaluation": "scores of a run",
    "baselines": "majority, zero-shot",
    "export": "files to serve",
    "assembly": "the parts of a run",
    "inference": "opens trained models",
    "scoring": "scores on tasks",
    "training": "loop, optimizer, checkpoints",
    "evaluation": "scores and statistics",
    "sinks": "terminal, files, trackers",
    "objectives": "batches and losses",
    "adapters": "LoRA and its files",
    "models": "all of transformers",
    "quant": "base formats",
    "data": "rows to batches",
    "parallel": "devices and ranks",
    "rewards": "scores of sampled answers",
    "kernels": "numba, Triton",
    "gguf": "llama.cpp files",
    "planning": "memory and steps",
    "report": "results, pages, charts",
    "events": "what a run reports",
    "config": "one tree of options",
    "env": "environment",
    "atomic": "complete files or none",
    "errors": "where, why, fix",
    "wording": "numbers in words",
    "stopping": "signals",
    "outcome": "results of threads",
}
WIDTH, ROW, GAP = 860, 46, 8


def contracts() -> list[dict[str, Any]]:
    """Returns the contracts of import-linter."""
    found: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    return found


def layers() -> list[list[str]]:
    """Returns the packages of each layer, from the top."""
    rows = next(contract for contract in contracts() if contract["id"] == "layers")["layers"]
    return [[name.strip(" ()") for name in row.split("|")] for row in rows]


def torch_free() -> set[str]:
    """Returns the packages that load neither torch nor transformers."""
    names = next(contract for contract in contracts() if contract["id"] == "torch-free")["source_modules"]
    return {name.removeprefix("ingle.") for name in names}


def purpose(name: str) -> str:
    """Returns the first line of the docstring of a package or module."""
    path = ROOT / "ingle" / name
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]


def table() -> list[tuple[str, str, str]]:
    """Returns a row for each package: its layer, name and purpose."""
    free = torch_free()
    return [
        (str(number), f"`{name}`" + ("" if name in free else " *"), purpose(name))
        for number, row in enumerate(layers(), 1)
        for name in row
    ]


def picture() -> str:
    """Returns the layers as SVG; packages of one row do not import one another."""
    rows, free = layers(), torch_free()
    height = len(rows) * (ROW + GAP) + GAP + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" text-anchor="middle" role="img" aria-label="Layers of the packages">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for index, row in enumerate(rows):
        width = (WIDTH - GAP * (len(row) + 1)) / len(row)
        top = GAP + index * (ROW + GAP)
        for place, name in enumerate(row):
            left = GAP + place * (width + GAP)
            middle = left + width / 2
            fill, line = ("#eef3ee", "#7d9a80") if name in free else ("#f6ece2", "#b98a5c")
            parts += [
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" rx="6" '
                f'fill="{fill}" stroke="{line}"/>',
                f'<text x="{middle:.1f}" y="{top + 20}" font-size="15" fill="#1f1f1f">{escape(name)}</text>',
                f'<text x="{middle:.1f}" y="{top + 37}" font-size="11.5" fill="#555">{escape(SUBTITLES[name])}</text>',
            ]
    caption = "A package imports only from rows below its own. Green packages load no torch."
    parts += [f'<text x="{WIDTH / 2}" y="{height - 14}" font-size="12.5" fill="#444">{caption}</text>', "</svg>"]
    return "\n".join(parts) + "\n"
