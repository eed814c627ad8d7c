"""Compares error and speed of HQQ: Ingle's joint solver and the published one, on the same weights.

    taskset -c 0 python -m benchmarks.hqq

The weights are Gaussian, heavy-tailed (Student's t with 3 degrees of freedom), or those of a model (``--model``, by
default the bundled one). Errors are relative to the weights: the ratio of the rms, and the ratio of the means of
``|w|^0.7``, which the published solver minimizes; storing zeros has an error of 1. The published solver is Ingle's
implementation (``solver: hqq``). If the ``hqq`` package is installed, its own quantizer runs too. Encoding is timed in
turns, in CPU time; decoding is to the compute dtype of a run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.dtypes import run_dtype
from benchmarks.timing import millions_per_s, take_turns
from ingle.kernels.threads import set_threads
from ingle.quant.hqq import Hqq

#: The exponent of the published solver's norm.
NORM = 0.7
MODEL = Path(__file__).parents[1] / "examples" / "models" / "ember-6m" / "model.safetensors"


def draw(kind: str, rows: int, columns: int, model: Path) -> Tensor:
    """Returns weights of a kind as a float32 matrix."""
    rng = np.random.default_rng(0)
    match kind:
        case "gaussian":
            return torch.from_numpy(0.02 * rng.standard_normal((rows, columns), dtype=np.float32))
        case "heavy-tailed":
            return torch.from_numpy(0.02 * rng.standard_t(3, (rows, columns))).float()
    parts = [tensor.flatten() for name, tensor in load_file(model).items() if tensor.dim() == 2 and "layers." in name]
    flat = torch.cat(parts).float()[: rows * columns]
    return flat[: flat.numel() // columns * columns].view(-1, columns)


def measure_error(weight: Tensor, decoded: Tensor) -> dict[str, float]:
    """Returns the relative errors in rms and in the p-norm that the published solver minimizes."""
    weight, difference = weight.double(), (decoded - weight).double()
    p_norm = difference.abs().pow(NORM).mean() / weight.abs().pow(NORM).mean()
    return {"rms": float(difference.norm() / weight.norm()), "p_norm": float(p_norm)}


def make_package() -> Callable[[Tensor, Hqq], object] | None:
    """Returns the quantizer of the ``hqq`` package, or None if it is not installed."""
    if importlib.util.find_spec("hqq") is None:
        return None
    from hqq.core.quantize import Quantizer

    def encode(weight: Tensor, format: Hqq) -> object:
        options = {"nbits": format.bits, "group_size": format.group_size, "round_zero": format.bits == 4}
        return Quantizer.quantize(weight, axis=1, device="cpu", compute_dtype=torch.float16, **options)

    return encode


def measure(kind: str, weight: Tensor, bits: int, size: int, rounds: int) -> dict[str, Any]:
    """Returns a row of the table."""
    ours, published = Hqq(bits, size), Hqq(bits, size, "hqq")
    planes = {format.solver: format.encode(weight) for format in (ours, published)}
    row: dict[str, Any] = {"weights": kind, "bits": bits, "group_size": size}
    row["bits_per_weight"] = ours.bits_per_weight(*weight.shape)
    for name, encoded in planes.items():
        row[name] = measure_error(weight, ours.decode(encoded, *weight.shape, torch.float32))
    functions: dict[str, Callable[[], object]] = {
        "ingle": lambda: ours.encode(weight),
        "hqq": lambda: published.encode(weight),
    }
    package = make_package()
    if package is not None:
        functions["package"] = lambda: package(weight, ours)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    row["encode"] = millions_per_s(take_turns(functions, rounds, clock=clock), weight.numel())
    out = torch.empty(weight.shape, dtype=run_dtype())
    decode = {"ingle": lambda: ours.decode(planes["ingle"], *weight.shape, out.dtype, out)}
    row["decode"] = millions_per_s(take_turns(decode, 10 * rounds), weight.numel())["ingle"]
    return row


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256, help="rows of 4096 weights")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2, 1], choices=[8, 4, 3, 2, 1])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[64], choices=[8, 16, 32, 64, 128])
    parser.add_argument("--model", type=Path, default=MODEL, help="a safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    set_threads(options.threads)
    weights = {kind: draw(kind, options.rows, 4096, options.model) for kind in ("gaussian", "heavy-tailed", "model")}
    rows = [
        measure(kind, weight, bits, size, options.rounds)
        for bits in options.bits
        for size in options.group_sizes
        for kind, weight in weights.items()
    ]
    if options.json:
        print(json.dumps({"threads": options.threads, "hqq": rows}))
        return
    print(f"Relative error, rms and |w|^{NORM} (ingle / published); encoding and decoding in million weights/s on")
    print(f"{options.threads} threads (encoding: ingle / published{' / package' if make_package() else ''})")
    print("| bits | group | bpw | weights | rms | p-norm | encoding | decoding |\n|--:|--:|--:|---|--:|--:|--:|--:|")
    for row in rows:
        errors = [" / ".join(f"{row[solver][key]:.4f}" for solver in ("ingle", "hqq")) for key in ("rms", "p_norm")]
        rates = " / ".join(f"{rate:.1f}" for rate in row["encode"].values())
        cells = (row["bits"], row["group_size"], f"{row['bits_per_weight']:.2f}", row["weights"], *errors, rates)
        print(f"| {' | '.join(map(str, cells))} | {row['decode']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
