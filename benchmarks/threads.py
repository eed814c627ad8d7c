"""Measures ways in which threads wait for each other, and what Ingle's rule gains or costs.

    taskset -c 0,1 python -m benchmarks.threads --threads 2

Processes with different settings take the step of ``benchmarks.finetune`` in turns: ``spins`` waits actively for
milliseconds, which is OpenMP's default; ``yields`` waits actively for ``GOMP_SPINCOUNT=1000`` iterations; ``passive``
sleeps immediately. They run alone first, and then next to one busy program per thread. The script prints the medians,
what the rule chooses at that moment, and how that compares with the best of the three. Finally it prints what the rule
chooses when the busy programs have just ended and the load average still includes them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import lora_steps
from benchmarks.dtypes import NAMES, run_dtype, word

#: Environment variables of each way to wait; the rule of ``ingle.env`` chooses one of the first two.
WAYS = {"spins": {}, "yields": {"GOMP_SPINCOUNT": "1000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
PEER = "transformers + PEFT"
_CHOICE = """
from ingle import env
env.limit_spinning()
print("yields" if "GOMP_SPINCOUNT" in env.os.environ else "spins")
"""


def choose(threads: int) -> str:
    """Returns what the rule chooses now, in a new process."""
    unset = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, "-c", _CHOICE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Runs ``count`` programs that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(sides: dict[str, lora_steps.Side], turns: int) -> dict[str, float]:
    """Returns the median seconds of a step of each side."""
    for side in sides.values():
        side.steps.clear()
    lora_steps.take_turns(sides, turns)
    return {name: statistics.median(step["seconds"] for step in side.steps) for name, side in sides.items()}


def show(title: str, seconds: dict[str, float], chosen: str, num_tokens: int) -> None:
    """Prints a table."""
    best = min(seconds[way] for way in WAYS)
    print(f"{title}: the rule chooses {chosen!r}")
    for name, each in seconds.items():
        print(f"  {name:<20} {num_tokens / each:8.1f} tokens/s   {best / each:5.2f} of the best")
    other = next(way for way in list(WAYS)[:2] if way != chosen)
    print(f"  the rule: {seconds[other] / seconds[chosen]:.2f} x {other!r}, {best / seconds[chosen]:.2f} of the best")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="turns of three steps per process, after one warm-up turn")
    parser.add_argument("--base", default="none", help="base format")
    parser.add_argument("--dtype", default="auto", choices=NAMES, help="auto: the dtype of a run on this machine")
    parser.add_argument("--peer", action="store_true", help="also measure transformers + PEFT")
    parser.add_argument("--tiny", action="store_true", help="use a small model, to test the script")
    options = parser.parse_args()
    shape = lora_steps.TINY if options.tiny else lora_steps.Shape()
    print(f"{options.threads} threads, base {options.base}, {word(run_dtype(options.dtype))}")
    print(f"running programs, with this script: {_running()}, load average {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        lora_steps.make_model(shape, Path(folder))
        words = ["--base", options.base, "--dtype", options.dtype, "--threads", str(options.threads)]
        words += ["--folder", folder, *["--tiny"] * options.tiny]
        sides = {way: lora_steps.Side(f"ingle:{way}", words, WAYS[way]) for way in WAYS}
        if options.peer:
            sides[PEER] = lora_steps.Side("peer", words)
        for side in sides.values():
            closing.callback(side.close)
        chosen = choose(options.threads)
        show("Alone", measure(sides, options.turns), chosen, shape.num_tokens)
        with busy_programs(options.threads):
            chosen = choose(options.threads)
            seconds = measure(sides, options.turns)
        show(f"Next to {options.threads} busy programs", seconds, chosen, shape.num_tokens)
        print(f"After them: the rule chooses {choose(options.threads)!r}, load average {os.getloadavg()[0]:.2f}")


def _running() -> str:
    try:
        return Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()
