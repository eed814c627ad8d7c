"""Measures how fast weights are encoded in GGUF's formats, by Ingle and by ggml's quantizer, on one core each.

    taskset -c 0 python -m benchmarks.encode

The peer is ``ggml_quantize_chunk`` of the library inside llama-cpp-python (``--library`` selects another one). It uses
one thread, so by default Ingle does too; ``--threads`` sets more. The two alternate in rounds, and times are processor
times, which depend less on other processes of a busy machine.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import millions_per_s, take_turns
from ingle.config.base import base_sections, format_name
from ingle.config.ggml import GgmlBase
from ingle.kernels.threads import set_threads
from ingle.quant import make_format

FORMATS: dict[str, type[GgmlBase]] = {
    format_name(section): section
    for section in base_sections()
    if issubclass(section, GgmlBase) and section.read_only is None
}
#: Numbers of the types in ggml.h.
KINDS = {
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13},
    **{"q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "tq1_0": 34, "tq2_0": 35},
}


def load_peer(path: Path | None) -> Any:
    """Returns the library of ggml, or None if it is not installed."""
    if path is None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return None
        path = next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]
    return library


def measure_format(peer: Any, name: str, shape: tuple[int, int], weighted: bool, rounds: int) -> dict[str, float]:
    """Returns one row of the table."""
    section = FORMATS[name]
    format = make_format(section.model_validate({"format": name}))
    assert format is not None
    weight = 0.02 * torch.randn(shape)
    importance = torch.rand(shape[1]) if weighted else None
    functions: dict[str, Callable[[], object]] = {"ours": lambda: format.encode(weight, importance)}
    data = torch.empty(shape[0], shape[1] // section.block_size * section.block_bytes, dtype=torch.uint8)

    def encode() -> None:
        given = None if importance is None else importance.data_ptr()
        peer.ggml_quantize_chunk(KINDS[name], weight.data_ptr(), data.data_ptr(), 0, *shape, given)

    if peer is not None:
        functions["peer"] = encode
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    row = millions_per_s(take_turns(functions, rounds, clock=clock), weight.numel())
    if peer is not None:
        row["ratio"] = row["ours"] / row["peer"]
        row["equal"] = float(torch.equal(format.encode(weight, importance)["data"], data))
    return row


def main() -> None:
    """Parses the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1024, help="rows of 4096 weights, as in an mlp of a 7B model")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument(
        "--library", dest="ggml", type=Path, help="ggml's library, instead of the one in llama-cpp-python"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    set_threads(options.threads)
    torch.manual_seed(0)
    peer = load_peer(options.ggml)
    rows = {
        f"{name}{', importance' if weighted else ''}": measure_format(
            peer, name, (options.rows, 4096), weighted, options.rounds
        )
        for name in options.formats
        for weighted in (False, True)
    }
    if options.json:
        print(json.dumps({"threads": options.threads, "encode": rows}))
        return
    print(f"Encode, million weights/s on {options.threads} threads (peer: ggml_quantize_chunk on one)")
    for label, row in rows.items():
        print(f"  {label:<20} " + "   ".join(f"{key} {value:.1f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
