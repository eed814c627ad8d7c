"""Compares speed and memory of LoRA fine-tuning with Ingle and with transformers + PEFT.

    taskset -c 0,1 python -m benchmarks.finetune --base none nf4 --threads 2

Both start from the same weights and take full optimizer steps on the same tokens. Each runs in its own process, and
they take turns, so that a busy machine slows both. A turn is three consecutive steps; the first is not counted, because
the other side has changed the state of caches and clocks. Both compute in the dtype of a run on this machine. The
script prints the medians over the steps after warm-up, their ratio, the peak memory and the floor: the time of the
step's matrix products alone, at the rate at which this machine multiplies such matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.dtypes import NAMES, run_dtype, word
from benchmarks.lora_steps import TINY, Shape, Side, make_model, summarize, take_turns


def count_flops(shape: Shape) -> dict[str, float]:
    """Returns the FLOP that a step needs at least, by part.

    Forward and the gradient of the input each take 2 FLOP per weight and token. Frozen weights need no gradient, and
    neither does the input of the first layer's q, k and v. Causal attention uses half of its T^2 pairs, with 2 products
    in forward and 4 in backward (recomputed scores are not counted, although both sides recompute them).
    """
    n, layers = shape.num_tokens, shape.num_hidden_layers
    weights = sum(o * i for o, i in shape.linears.values())
    first = sum(o * i for name, (o, i) in shape.linears.items() if name in "qkv")
    factors = sum(shape.rank * (o + i) for o, i in shape.linears.values())
    head = shape.vocab_size * shape.hidden_size
    pairs = shape.num_documents * shape.document_len * (shape.document_len + 1) / 2
    return {
        "frozen linears": 2 * n * (2 * weights * layers - first),
        "adapters": 6 * n * factors * layers,
        "head": 4 * n * head,
        "attention": 6 * 2 * pairs * shape.hidden_size * layers,
    }


def measure_matmul_rate(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Returns the rates of matrix products in the shapes of the step, in FLOP/s, by shape; outputs are reused."""
    rates = {}
    maps = {f"{o}x{i}": (o, i) for o, i in shape.linears.values()}
    maps["head"] = (shape.vocab_size, shape.hidden_size)
    for name, (o, i) in maps.items():
        rows = shape.num_tokens if name != "head" else 512
        x, w = torch.randn(rows, i, dtype=dtype), torch.randn(o, i, dtype=dtype)
        y, g = torch.empty(rows, o, dtype=dtype), torch.empty(rows, i, dtype=dtype)

        def both(x: Any = x, w: Any = w, y: Any = y, g: Any = g) -> None:
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=g)

        rates[name] = 4 * rows * o * i / fastest_half(both)
    return rates


def floor_seconds(shape: Shape, rates: dict[str, float]) -> float:
    """Returns the time of the step's products at the measured rates; attention and adapters at the mean rate."""
    flops = count_flops(shape)
    n, layers = shape.num_tokens, shape.num_hidden_layers
    seconds = 0.0
    for name, (o, i) in shape.linears.items():
        passes = 2 * layers - (name in "qkv")
        seconds += passes * 2 * n * o * i / rates[f"{o}x{i}"]
    mean = flops["frozen linears"] / seconds
    return seconds + flops["head"] / rates["head"] + (flops["adapters"] + flops["attention"]) / mean


def fastest_half(work: Callable[[], None], repeats: int = 12) -> float:
    """Returns the median of the faster half of the repeats in seconds, because other programs only slow one down."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[: repeats // 2])


def compare(shape: Shape, folder: Path, base: str, options: argparse.Namespace) -> dict[str, Any]:
    """Takes steps on all sides in turns and returns the medians."""
    arguments = ["--base", base, "--threads", str(options.threads), "--folder", str(folder), "--dtype", options.dtype]
    sides = {name: Side(name, arguments + ["--tiny"] * options.tiny) for name in options.sides}
    take_turns(sides, options.turns)
    result = {name: summarize(side, shape) for name, side in sides.items()}
    if options.profile:
        for key, seconds, calls in sides[options.sides[0]].ask("profile")["profile"]:
            print(f"    {seconds * 1e3:8.1f} ms {calls:6d} x {key}")
    for side in sides.values():
        side.close()
    return result


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["none", "nf4"], help="base formats; peers support none and nf4")
    parser.add_argument(
        "--sides", nargs="+", default=["ingle", "peer"], help="ingle, ingle-eager, ingle-compiled, peer, peer-bf16"
    )
    parser.add_argument("--turns", type=int, default=4, help="turns of three steps per side, after one warm-up turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=NAMES, help="auto: the dtype of a run on this machine")
    parser.add_argument("--profile", action="store_true", help="print the operators of one step of the first side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tiny", action="store_true", help="use a small model, to test the script")
    options = parser.parse_args()
    shape = TINY if options.tiny else Shape()
    torch.set_num_threads(options.threads)
    dtype = run_dtype(options.dtype)
    rates = measure_matmul_rate(shape, dtype)
    flops = count_flops(shape)
    floor = floor_seconds(shape, rates)
    print(
        f"{shape.num_documents} x {shape.document_len} tokens, {sum(flops.values()) / 1e12:.2f} TFLOP per step: "
        + ", ".join(f"{name} {value / 1e12:.3f}" for name, value in flops.items())
    )
    print(
        f"{word(dtype)} products: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()) + " GFLOP/s"
    )
    print(f"Floor: {floor:.3f} s per step, {shape.num_tokens / floor:.0f} tokens/s")
    figures: dict[str, Any] = {"floor_tokens_per_s": shape.num_tokens / floor, "rates": rates}
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        for base in options.base:
            print(f"Base {base}:")
            figures[base] = result = compare(shape, Path(folder), base, options)
            for name, row in result.items():
                low, high = row["quartiles"]
                print(
                    f"  {name:<16} {row['tokens_per_s']:7.0f} tokens/s  ({row['seconds']:.2f} s; quartiles {low:.2f} - "
                    f"{high:.2f})  {floor / row['seconds']:5.0%} of the floor  peak {row['peak_mib']:5.0f} MiB "
                    f"(weights {row['weights_mib']:.0f})  {row['page_faults']:.0f} page faults"
                )
            ours, peers = result.get("ingle"), [row for name, row in result.items() if name.startswith("peer")]
            if ours:
                for row in peers:
                    print(
                        f"  ratio {ours['tokens_per_s'] / row['tokens_per_s']:.2f} x, "
                        f"memory {ours['peak_mib'] / row['peak_mib']:.2f} x"
                    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
