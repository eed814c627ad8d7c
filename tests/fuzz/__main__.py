"""``python -m tests.fuzz``: runs random inputs, or repeats a failed one.

Source of the method: B. Miller, L. Fredriksen, B. So, "An empirical study of the reliability of UNIX utilities", 1990.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import count
from pathlib import Path


def main() -> int:
    """Runs cases, prints a table, and returns 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="time to run")
    parser.add_argument("--cases", type=int, help="number of cases per target, instead of a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; each case increments it")
    parser.add_argument("--target", action="append", help="run only this target; can be repeated")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder for failed cases")
    parser.add_argument("--replay", type=Path, help="repeat the case in this file of that folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ingle-fuzz-") as scratch:
        root = Path(scratch).resolve()
        _prepare_environment(root)
        return _replay(root, given.replay.resolve()) if given.replay else _fuzz(root, given)


def _prepare_environment(root: Path) -> None:
    """Sets one thread, no hub and empty folders; call this before any import."""
    home = root / "home"
    home.mkdir()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
    os.environ |= threads | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HOME": str(home)}
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # the only one that can be forked without another library
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TRANSFORMERS_CACHE"):
        os.environ.pop(name, None)
    _load_everything()


def _load_everything() -> None:
    """Imports everything that cases need."""
    import warnings

    warnings.simplefilter("ignore")
    import pyarrow
    import torch
    import transformers

    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    transformers.utils.logging.set_verbosity_error()
    from transformers import LlamaForCausalLM

    import ingle.export.entry
    import ingle.export.quantization
    import ingle.flow
    import ingle.inference
    import ingle.sinks.terminal
    from ingle.cli import app

    assert app and ingle and LlamaForCausalLM


def _fuzz(root: Path, given: argparse.Namespace) -> int:
    from tests.fuzz.engine import Fuzzer
    from tests.fuzz.targets import TARGETS

    names = given.target or list(TARGETS)
    fuzzer = Fuzzer(root, names, given.failures.resolve())
    end = time.monotonic() + given.seconds
    for seed in count(given.seed) if given.cases is None else range(given.seed, given.seed + given.cases):
        for name in names:
            # Slow targets get fewer cases, so that all targets get about the same time.
            late = given.cases is None and fuzzer.tallies[name].seconds > 2 * _median(fuzzer, names) + 5
            if not late:
                outcome = fuzzer.run(fuzzer.case(name, seed))
                if outcome.failed:
                    print(f"{name} {seed}: {outcome.kind}: {outcome.cause}", flush=True)
            if given.cases is None and time.monotonic() > end:
                return _report(fuzzer, given.failures)
    return _report(fuzzer, given.failures)


def _median(fuzzer: object, names: list[str]) -> float:
    times = sorted(fuzzer.tallies[name].seconds for name in names)  # type: ignore[attr-defined]
    return times[len(times) // 2]


def _report(fuzzer: object, failures: Path) -> int:
    from tests.fuzz.engine import Fuzzer
    from tests.fuzz.sandbox import REFUSED, SUCCESS

    assert isinstance(fuzzer, Fuzzer)
    head = ("target", "cases", "success", "same", "refused", "unplaced", "failures", "slowest")
    print("".join(f"{word:>10}" if at else f"{word:<14}" for at, word in enumerate(head)))
    failed = 0
    for name, tally in fuzzer.tallies.items():
        kinds = tally.kinds
        cells = (kinds.total(), kinds[SUCCESS], tally.same, kinds[REFUSED], tally.unplaced, tally.failures)
        print(f"{name:<14}" + "".join(f"{cell:>10}" for cell in cells) + f"{tally.slowest:>8.1f} s")
        failed += tally.failures
    for name, tally in fuzzer.tallies.items():
        for cause, number in tally.causes.most_common():
            print(f"  {name}: {number} x {cause}")
    if failed:
        print(f"{failed} cases failed; {failures} contains each of them and the command that repeats it")
    return 1 if failed else 0


def _replay(root: Path, path: Path) -> int:
    import json

    from tests.fuzz.engine import Fuzzer

    case, outcome = Fuzzer(root, [json.loads(path.read_text())["target"]]).replay(path)
    print("\n".join(case.done))
    print(f"{outcome.kind}: {outcome.cause}\n{outcome.message}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
