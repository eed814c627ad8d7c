"""Compares base formats: how fast they decode, and how fast QLoRA runs on them.

    taskset -c 0,1 python -m benchmarks.formats --threads 2

First come the decode kernels, next to those of bitsandbytes. The aim is 4 billion weights per second on two cores, and
twice the rate of bitsandbytes. Then come full optimizer steps of LoRA on each base, each in its own process. The aim is
at least 85 % of nf4's tokens per second. All measurements are interleaved, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode, lora_steps
from benchmarks.dtypes import run_dtype, word
from ingle.kernels.threads import set_threads

FORMATS = ("nf4", "q8_0", "q4_0", "q4_k", "q6_k")
#: Aims: billion weights per second, ratio to bitsandbytes, ratio to nf4's tokens per second.
AIMS = {"decode": 4.0, "peer": 2.0, "train": 0.85}


def measure_decodes(formats: list[str], where: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns a row per format: weights decoded per second to the dtype of a run, and the peer's rate."""
    peer = decode.load_peer()
    shape = decode.SHAPES[where]
    return {name: decode.measure_decode(peer, name, shape, run_dtype(), rounds) for name in formats}


def measure_training(bases: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns a row per base: tokens per second of QLoRA, and memory."""
    shape = lora_steps.TINY if options.tiny else lora_steps.Shape()
    with tempfile.TemporaryDirectory() as folder:
        lora_steps.make_model(shape, Path(folder))
        common = ["--threads", str(options.threads), "--folder", folder, *["--tiny"] * options.tiny]
        sides = {base: lora_steps.Side("ingle", ["--base", base, *common]) for base in bases}
        lora_steps.take_turns(sides, options.turns)
        rows = {base: lora_steps.summarize(side, shape) for base, side in sides.items()}
        for side in sides.values():
            side.close()
    for row in rows.values():
        row["of_nf4"] = row["tokens_per_s"] / rows["nf4"]["tokens_per_s"]
    return rows


def mark(value: float, aim: float) -> str:
    """Returns ``ok``, or the aim if it was missed."""
    return "ok" if value >= aim else f"below {aim:g}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of decoding")
    parser.add_argument(
        "--shape", default="mlp of 4096", choices=list(decode.SHAPES), help="shape of the decoded weight"
    )
    parser.add_argument("--turns", type=int, default=4, help="turns of three steps per base, after one warm-up turn")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(decode.FORMATS))
    parser.add_argument("--bases", nargs="+", default=list(FORMATS), help="bases to train on; nf4 is always included")
    parser.add_argument("--tiny", action="store_true", help="use a small model, to test the script")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    set_threads(options.threads)
    torch.manual_seed(0)
    decodes = measure_decodes(options.formats, options.shape, options.rounds)
    print(f"Decode of {options.shape} into {word(run_dtype())}, billion weights/s on {options.threads} threads")
    for name, row in decodes.items():
        rate = row["decode"]
        line = f"  {name:<8} {rate['median']:6.2f} (best {rate['best']:.2f})  {mark(rate['median'], AIMS['decode'])}"
        if "peer" in row:
            ratio = row["ratio"]["median"]
            line += f"   bitsandbytes {row['peer']['median']:.2f}, {ratio:.2f} x  {mark(ratio, AIMS['peer'])}"
        print(line)
    print(f"QLoRA, {options.threads} threads")
    training = measure_training(list(dict.fromkeys(["nf4", *options.bases])), options)
    for base, row in training.items():
        low, high = row["quartiles"]
        print(
            f"  {base:<8} {row['tokens_per_s']:7.0f} tokens/s ({row['seconds']:.2f} s; quartiles {low:.2f} - "
            f"{high:.2f})  {row['of_nf4']:.2f} of nf4  {mark(row['of_nf4'], AIMS['train'])}   peak "
            f"{row['peak_mib']:.0f} MiB (weights {row['weights_mib']:.0f})"
        )
    if options.json:
        options.json.write_text(json.dumps({"decode": decodes, "training": training}, indent=2))


if __name__ == "__main__":
    main()
