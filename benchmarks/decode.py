"""Measures how fast base weights are encoded and decoded on the CPU, by Ingle and by bitsandbytes, in one run.

    taskset -c 0,1 python -m benchmarks.decode --threads 2

All measured functions alternate in rounds, so that a busy machine slows all of them. The output has medians over the
rounds, with the best in brackets. The lower bound for decoding is the time of a plain copy to the same memory, measured
in the same rounds. In the last table, a decode alternates with the product that uses its result, as in a layer; this
shows the cost of sharing processors with torch's own threads.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.dtypes import run_dtype, word
from benchmarks.timing import take_turns
from ingle.kernels.threads import set_threads
from ingle.quant.format import Format
from ingle.quant.ggml import GGUF_FORMATS, GgmlBlocks
from ingle.quant.int8 import Int8
from ingle.quant.levels import Fp4, Levels, Nf4
from ingle.quant.ternary import Ternary

SHAPES = {"mlp of 1024": (2816, 1024), "attention of 4096": (4096, 4096), "mlp of 4096": (11008, 4096)}
FORMATS: dict[str, Format] = {
    **{"nf4": Nf4(), "nf4, plain absmax": Nf4(double_quant=False), "fp4": Fp4(), "int8": Int8(), "ternary": Ternary()},
    **{member().name: member() for member in GGUF_FORMATS},
}
#: Formats measured by default.
USUAL = ["nf4", "nf4, plain absmax", "int8", "q8_0", "q4_0", "q4_k", "q6_k"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_peer() -> Any:
    """Returns the functions of bitsandbytes, or None if it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import bitsandbytes.functional as peer
        except ImportError:
            return None
    return peer


def rate(work: float, seconds: list[float]) -> dict[str, float]:
    """Returns work per second in billions: median and best."""
    return {"median": work / statistics.median(seconds) / 1e9, "best": work / min(seconds) / 1e9}


def compare(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Returns how many times faster Ingle is than the peer: median and best."""
    ours, theirs = seconds["ours"], seconds["peer"]
    return {"median": statistics.median(theirs) / statistics.median(ours), "best": min(theirs) / min(ours)}


def is_read_only(format: Format) -> bool:
    """Returns whether a format has no encoder."""
    return isinstance(format, GgmlBlocks) and format.base.read_only is not None


def make_planes(format: Format, weight: Tensor) -> dict[str, Tensor]:
    """Returns an encoded weight; random bytes if the format has no encoder."""
    if not is_read_only(format):
        return format.encode(weight)
    out_features, in_features = weight.shape
    specs = format.plane_specs(out_features, in_features)
    return {name: torch.randint(0, 256, spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


def make_peer(peer: Any, format: Format, weight: Tensor, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """Returns the peer's decoder and encoder for the same weight and dtype."""
    if peer is None:
        return None
    if isinstance(format, Int8):
        codes, scale, _ = peer.int8_vectorwise_quant(weight.half())
        half = weight.half()
        return lambda: peer.int8_vectorwise_dequant(codes, scale).to(dtype), lambda: peer.int8_vectorwise_quant(half)
    if not isinstance(format, Levels):
        return None
    nested, size = format.double_quant, format.block_size
    cast = weight.to(dtype)

    def encode() -> Any:
        return peer.quantize_4bit(cast, blocksize=size, quant_type=format.name, compress_statistics=nested)

    quantized, state = encode()
    return lambda: peer.dequantize_4bit(quantized, state), encode


def measure_decode(peer: Any, name: str, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Returns one row of the first table."""
    format = FORMATS[name]
    weight = torch.randn(shape)
    planes = make_planes(format, weight)
    out, source = torch.empty(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: format.decode(planes, *shape, dtype, out),
        "floor": lambda: out.copy_(source),
    }
    theirs = make_peer(peer, format, weight, dtype)
    if theirs is not None:
        functions["peer"] = theirs[0]
    seconds = take_turns(functions, rounds, warm_up=2)
    weights, num_bytes = weight.numel(), out.numel() * out.element_size()
    row: dict[str, Any] = {
        "decode": rate(weights, seconds["ours"]),
        "written_GB_per_s": rate(num_bytes, seconds["ours"]),
    }
    row["copy_GB_per_s"] = rate(num_bytes, seconds["floor"])
    row["share_of_copy"] = statistics.median(seconds["floor"]) / statistics.median(seconds["ours"])
    if theirs is not None:
        row["peer"] = rate(weights, seconds["peer"])
        row["ratio"] = compare(seconds)
    return row


def measure_encode(peer: Any, name: str, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Returns one row of the second table."""
    format = FORMATS[name]
    weight = torch.randn(shape).to(dtype)
    functions: dict[str, Callable[[], object]] = {"ours": lambda: format.encode(weight)}
    theirs = make_peer(peer, format, weight, dtype)
    if theirs is not None:
        functions["peer"] = theirs[1]
    seconds = take_turns(functions, rounds, warm_up=2)
    row: dict[str, Any] = {"encode": rate(weight.numel(), seconds["ours"])}
    if theirs is not None:
        row["peer"] = rate(weight.numel(), seconds["peer"])
        row["ratio"] = compare(seconds)
    return row


def measure_layer(name: str, shape: tuple[int, int], num_tokens: int, rounds: int) -> dict[str, Any]:
    """Returns one row of the third table: decode and product, each alone and alternating, in milliseconds."""
    format, dtype = FORMATS[name], run_dtype()
    planes = make_planes(format, torch.randn(shape))
    weight, x = torch.empty(shape, dtype=dtype), torch.randn(num_tokens, shape[1], dtype=dtype)

    def decode() -> Tensor:
        return format.decode(planes, *shape, dtype, weight)

    def multiply() -> Tensor:
        return functional.linear(x, weight)

    alone = {
        key: take_turns({key: function}, rounds, warm_up=2)[key] for key, function in (("d", decode), ("m", multiply))
    }
    turns = take_turns({"d": decode, "m": multiply}, rounds, warm_up=2)
    medians = [1e3 * statistics.median(seconds) for seconds in (alone["d"], turns["d"], alone["m"], turns["m"])]
    row = dict(zip(("decode_alone_ms", "decode_ms", "product_alone_ms", "product_ms"), medians, strict=True))
    return row | {"share_of_layer": row["decode_ms"] / (row["decode_ms"] + row["product_ms"])}


def render(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Returns a table of rows: rates as ``median (best)``."""
    lines = [title]
    for label, row in rows.items():
        cells = []
        for key, value in row.items():
            shown = f"{value['median']:.2f} ({value['best']:.2f})" if isinstance(value, dict) else f"{value:.2f}"
            cells.append(f"{key} {shown}")
        lines.append(f"  {label:<48} " + "   ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the product in the last table")
    parser.add_argument("--formats", nargs="+", default=USUAL, choices=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    set_threads(options.threads)
    torch.manual_seed(0)
    peer = load_peer()
    decodes, encodes, layers = {}, {}, {}
    for name in options.formats:
        for where in options.shapes:
            shape = SHAPES[where]
            rounds = max(5, options.rounds // (1 + shape[0] // 8192))
            for kind, dtype in DTYPES.items():
                decodes[f"{name}, {where}, {kind}"] = measure_decode(peer, name, shape, dtype, rounds)
        shape = SHAPES["mlp of 4096"]
        if not is_read_only(FORMATS[name]):
            encodes[f"{name}, mlp of 4096, bfloat16"] = measure_encode(peer, name, shape, torch.bfloat16, 3)
        layers[f"{name}, mlp of 1024, {word(run_dtype())}"] = measure_layer(
            name, SHAPES["mlp of 1024"], options.tokens, options.rounds
        )
    result = {"threads": torch.get_num_threads(), "decode": decodes, "encode": encodes, "layer": layers}
    if options.json:
        print(json.dumps(result))
        return
    print(render(f"Decode, billion weights/s on {options.threads} threads (peer: bitsandbytes)", decodes))
    print(render("\nEncode, billion weights/s (peer: bitsandbytes)", encodes))
    print(render(f"\nDecode and product alternating, {options.tokens} tokens, ms", layers))


if __name__ == "__main__":
    main()
