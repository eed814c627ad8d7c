"""How threads should wait for one another: what Ingle's rule gains on a busy machine and costs on a quiet one.

    taskset -c 0,1 python -m benchmarks.threads --threads 2

The step of ``benchmarks.finetune`` is taken turn by turn by processes that wait in different ways: ``spins`` as
OpenMP does by itself, for milliseconds; ``gives way`` after ``GOMP_SPINCOUNT=1000`` turns; ``passive`` at once.  First
with the machine to themselves, then next to programs that this script starts, one for each thread.  Printed with the
medians is what the rule chooses at that moment, and what it loses to the best of the three.  Last comes the moment
after a load: the programs have ended, and the load average still holds them.
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

from benchmarks import finetune
from benchmarks.dtypes import NAMES, run_dtype, word

#: How threads wait, by what the environment says; the rule of ``ingle.env`` chooses one of the first two.
WAYS = {"spins": {}, "gives way": {"GOMP_SPINCOUNT": "1000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
PEER = "transformers + PEFT"
_CHOICE = """
from ingle import env
env.limit_spinning()
print("gives way" if "GOMP_SPINCOUNT" in env.os.environ else "spins")
"""


def choose(threads: int) -> str:
    """What the rule says now, in a fresh process."""
    environment = {**_clean(), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", _CHOICE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """That many programs that compute without a pause."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(sides: dict[str, finetune.Side], turns: int) -> dict[str, float]:
    """Median seconds of a step of each side."""
    for side in sides.values():
        side.steps.clear()
    finetune.take_turns(sides, turns)
    return {name: statistics.median(step["seconds"] for step in side.steps) for name, side in sides.items()}


def show(title: str, seconds: dict[str, float], chosen: str, num_tokens: int) -> None:
    """One table."""
    best = min(seconds[way] for way in WAYS)
    print(f"{title}: the rule chooses {chosen!r}")
    for name, each in seconds.items():
        print(f"  {name:<20} {num_tokens / each:8.1f} tokens/s   {best / each:5.2f} of the best way")
    other = next(way for way in list(WAYS)[:2] if way != chosen)
    print(f"  the rule: {seconds[other] / seconds[chosen]:.2f} x {other!r}, {best / seconds[chosen]:.2f} of the best")


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="of each process, three steps each, after one to warm up")
    parser.add_argument("--base", default="none", help="of the base")
    parser.add_argument("--dtype", default="auto", choices=NAMES, help="auto: what a run would compute in here")
    parser.add_argument("--peer", action="store_true", help="take turns with transformers + PEFT too")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    options = parser.parse_args()
    shape = finetune.TINY if options.tiny else finetune.Shape()
    print(f"{options.threads} threads, base {options.base}, {word(run_dtype(options.dtype))}")
    print(f"running now: {_running()} (this script among them), load average {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        finetune.make_model(shape, Path(folder))
        words = ["--base", options.base, "--dtype", options.dtype, "--threads", str(options.threads)]
        words += ["--folder", folder, *["--tiny"] * options.tiny]
        sides = {way: finetune.Side(f"ingle:{way}", words, WAYS[way]) for way in WAYS}
        if options.peer:
            sides[PEER] = finetune.Side("peer", words)
        for side in sides.values():
            closing.callback(side.close)
        chosen = choose(options.threads)
        show("alone", measure(sides, options.turns), chosen, shape.num_tokens)
        with neighbours(options.threads):
            chosen = choose(options.threads)
            seconds = measure(sides, options.turns)
        show(f"next to {options.threads} other programs", seconds, chosen, shape.num_tokens)
        print(f"after them: the rule chooses {choose(options.threads)!r}, load average {os.getloadavg()[0]:.2f}")


def _clean() -> dict[str, str]:
    """The environment without what a user may have said about threads."""
    return {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}


def _running() -> str:
    try:
        return Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()
