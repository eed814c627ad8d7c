"""Measures the start-up time of ``ingle generate`` against importing torch and one transformers model class.

    python -m benchmarks.startup

Each turn starts both as new processes. The import is the floor, since the answer cannot be computed without it. With
``-X importtime`` the script then lists what else the command imports, the slowest first.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = ["-c", "import torch\nfrom transformers import LlamaForCausalLM"]
_IMPORT = re.compile(r"import time:\s+(?P<own>\d+) \|\s+\d+ \|\s+(?P<module>\S+)")


def answer(run: str) -> list[str]:
    """Returns the arguments of the measured command."""
    return ["-m", "ingle", "generate", run, "--prompt", "Hello", "--max-new-tokens", "1"]


def train(folder: str) -> str:
    """Trains a short run on the demo's model and data, which also compiles the kernels, and returns its folder."""
    run = str(Path(folder) / "run")
    options = {
        "model.id": ROOT / "examples/models/ember-6m",
        "base.format": "nf4",
        "data.sources": ROOT / "examples/demo/train.jsonl",
        "train.num_steps": 2,
        "output": run,
    }
    _run(["-m", "ingle", "train", *(f"--{name}={value}" for name, value in options.items())])
    return run


def measure(words: list[str]) -> tuple[float, float]:
    """Returns wall-clock seconds and CPU seconds of one process."""
    before, start = os.times(), time.perf_counter()
    _run(words)
    seconds, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used


def list_imports(words: list[str]) -> dict[str, float]:
    """Returns milliseconds per imported module, without its own imports."""
    found = _IMPORT.finditer(_run(["-X", "importtime", *words]))
    return {match["module"]: int(match["own"]) / 1e3 for match in found}


def _run(words: list[str]) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="processes of each kind, after one warm-up turn")
    parser.add_argument("--run", help="a run folder; by default a short run is trained")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {"floor": FLOOR, "generate": answer(options.run or train(folder))}
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(1 + options.turns):
            for name, words in commands.items():
                measured = measure(words)
                if turn:
                    turns[name].append(measured)
        imports = {name: list_imports(words) for name, words in commands.items()}
    print("Seconds, median (minimum)           wall clock              CPU time")
    figures = {}
    for name, pairs in turns.items():
        wall, used = ([pair[k] for pair in pairs] for k in (0, 1))
        figures[name] = (statistics.median(wall), statistics.median(used), min(wall), min(used))
        print(f"{name:<30} {figures[name][0]:8.2f} ({min(wall):.2f}) {figures[name][1]:12.2f} ({min(used):.2f})")
    ratios = [ours / floor for ours, floor in zip(figures["generate"], figures["floor"], strict=True)]
    print(f"{'generate / floor':<30} {ratios[0]:8.2f} ({ratios[2]:.2f}) {ratios[1]:12.2f} ({ratios[3]:.2f})")
    extra = Counter[str]()
    for module, spent in imports["generate"].items():
        if module not in imports["floor"]:
            extra[module.partition(".")[0]] += spent
    print("Imports beyond the floor, ms: " + ", ".join(f"{name} {ms:.0f}" for name, ms in extra.most_common(10)))
    slowest = sorted(imports["generate"].items(), key=lambda item: -item[1])[:12]
    print("Slowest imports, ms: " + ", ".join(f"{name} {ms:.0f}" for name, ms in slowest))


if __name__ == "__main__":
    main()
