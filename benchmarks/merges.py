"""Measures how much of an adapter survives a merge: scores as trained and as served, on the bundled base and task.

    taskset -c 0,1 python -m benchmarks.merges --out runs/merges

Compares the usual route (train on NF4, merge into 16 bits, quantize to Q4_K) with routes that train what they serve.
Each adapter is trained once, with the same data, steps and seed, and scored twice on the same held-out samples: as
trained, and as served.  The output shows the size of the change relative to the weights, how much of it survives
quantization (correlation of the change of the quantized weights with that of the adapter; 1 is all of it), and bits per
byte as trained and as served with the paired difference and its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle import adapters, evaluation, flow, inference, models, parallel
from ingle.adapters import LoraLinear, merged_planes, merged_weight
from ingle.adapters.merging import base_weight
from ingle.config import TaskConfig, load_run
from ingle.config.base import NoBase, base_section
from ingle.config.parallel import ParallelConfig
from ingle.quant import Format, QuantLinear, make_format
from ingle.report.results import MetricComparison

CONFIG = Path("examples/demo/demo.yaml")

#: Flags of each run.
RUNS = {
    "nf4": ["--base=nf4"],
    "q4_k": ["--base=q4_k"],
    "q4_k-aware": ["--base=q4_k", "--adapter.merge_aware.fraction=0.25"],
    "q4_k-aware-whole": ["--base=q4_k", "--adapter.merge_aware.fraction=1.0"],
    "nf4-aware": ["--base=nf4", "--adapter.merge_aware.format=q4_k"],
    "none-aware": ["--base=none", "--adapter.merge_aware.format=q4_k"],
    "q5_1": ["--base=q5_1"],
    "q5_1-qa": ["--base=q5_1", "--adapter.kind=qa_lora"],
    "q5_1-qa-rounded": ["--base=q5_1", "--adapter.kind=qa_lora", "--adapter.train_rounding=true"],
}


@dataclass(frozen=True)
class Route:
    """A route from training to serving.

    Attributes:
        run: Name of the run.
        served: Description of what is served.
        format: Format that is served; None for the run's own.
        from_original: Merge into the original 16-bit weights instead of those that the adapter was trained on.
        through_bf16: Round the merged weights to bfloat16 before quantization, as a merged checkpoint does.
    """

    run: str
    served: str
    format: str | None = None
    from_original: bool = False
    through_bf16: bool = False


ROUTES = (
    Route("nf4", "16-bit originals + adapter, quantized to q4_k", "q4_k", from_original=True, through_bf16=True),
    Route("nf4", "decoded nf4 + adapter in 16 bit, quantized to q4_k", "q4_k", through_bf16=True),
    Route("nf4", "decoded nf4 + adapter in 16 bit", "none", through_bf16=True),
    Route("q4_k", "quantized again to q4_k"),
    Route("q4_k-aware", "quantized again to q4_k, trained for it"),
    Route("q4_k-aware-whole", "quantized again to q4_k, all steps trained for it"),
    Route("nf4-aware", "quantized to q4_k, trained for it", "q4_k"),
    Route("none-aware", "quantized to q4_k, trained for it", "q4_k"),
    Route("q5_1", "quantized again to q5_1"),
    Route("q5_1-qa", "folded into q5_1's offsets"),
    Route("q5_1-qa-rounded", "folded into q5_1's offsets, trained for it"),
)


def train(name: str, folder: Path, flags: list[str]) -> tuple[Path, dict[str, Any]]:
    """Trains one adapter unless its run is finished."""
    output = folder / name
    run = load_run(CONFIG, [*RUNS[name], "--evaluate=null", f"--output={output}", *flags]).run
    return output, flow.finetune(run)


def open_unmerged(run: Path, *, original: bool) -> Any:
    """Opens a run with its adapter unmerged, on the base of the run or on the original weights."""
    source = inference.locate(str(run))
    base = NoBase() if original else source.base
    device = parallel.start(ParallelConfig()).device
    model = models.load_model(source.model, base, device=device)
    assert source.adapter is not None
    adapters.load_adapter(model, source.adapter, allow_mismatch=original)
    for layer in adapters.lora_modules(model).values():
        layer.merged = None
    return model, models.load_tokenizer(source.model)


def serve(layer: LoraLinear, route: Route) -> tuple[Format | None, dict[str, Tensor]]:
    """Returns the format and the planes of a merged layer."""
    own = layer.base.format if isinstance(layer.base, QuantLinear) else None
    format = own if route.format is None else make_format(base_section(route.format))  # type: ignore[arg-type]
    if not route.through_bf16:
        return format, merged_planes(layer, format)
    weight = merged_weight(layer, torch.bfloat16)
    return format, {"weight": weight} if format is None else format.encode(weight)


def decode(layer: LoraLinear, format: Format | None, planes: dict[str, Tensor]) -> Tensor:
    """Returns the weight that is served."""
    if format is None:
        return planes["weight"].float()
    return format.decode(planes, layer.out_features, layer.in_features, torch.float32)


def merge(model: Any, route: Route) -> dict[str, float]:
    """Puts the served weights into the model and measures how much of the change survives."""
    moved_delta = moved_moved = delta_delta = weights = 0.0
    for name, layer in adapters.lora_modules(model).items():
        format, planes = serve(layer, route)
        after, before = decode(layer, format, planes), _unchanged(layer, route)
        delta = layer.spread(layer.delta())
        moved = after - before
        moved_delta += float((moved * delta).sum(dtype=torch.float64))
        moved_moved += float(moved.square().sum(dtype=torch.float64))
        delta_delta += float(delta.square().sum(dtype=torch.float64))
        weights += float(base_weight(layer).square().sum(dtype=torch.float64))
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data, plain.bias = after.to(layer.product_dtype(torch.empty(0, dtype=torch.bfloat16))), layer.bias
        model.set_submodule(name, plain.requires_grad_(False))
    return {
        "delta": (delta_delta / weights) ** 0.5,
        "correlation": moved_delta / (moved_moved * delta_delta) ** 0.5,
        "gain": moved_delta / delta_delta,
    }


def _unchanged(layer: LoraLinear, route: Route) -> Tensor:
    """Returns the weight that would be served without the adapter."""
    b = layer.lora_b.detach().clone()
    with torch.no_grad():
        layer.lora_b.zero_()
        found = decode(layer, *serve(layer, route))
        layer.lora_b.copy_(b)
    return found


def compare_routes(
    folder: Path, names: list[str], flags: list[str], task: TaskConfig, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Trains the named adapters and scores their routes."""
    trained: dict[str, evaluation.TaskResult] = {}
    rows = []
    for route in (route for route in ROUTES if route.run in names):
        run, report = train(route.run, folder, flags)
        aware = report.rounding is not None
        if route.run not in trained:
            engine = inference.open_model(str(run))
            trained[route.run] = evaluation.run_task(evaluation.ModelSource(engine.model, engine.tokenizer), task)
        model, tokenizer = open_unmerged(run, original=route.from_original)
        facts = merge(model, route)
        served = evaluation.run_task(evaluation.ModelSource(model, tokenizer), task)
        compared = evaluation.compare(trained[route.run], served, task).metrics
        row = {
            "run": route.run,
            "served": route.served,
            **facts,
            "train_s": report.train_s,
            "packing_s": report.rounding["packing_s"] if aware else 0.0,
            "metrics": pair(compared),
        }
        rows.append(row)
        say(describe(row))
    return rows


def pair(metrics: dict[str, MetricComparison]) -> dict[str, dict[str, Any]]:
    """Scores as trained and as served, from a comparison of the two."""
    return {
        name: {"trained": metric.base, "served": metric.tuned, "delta": metric.delta, "ci95": metric.ci95}
        for name, metric in metrics.items()
    }


def describe_pair(metrics: dict[str, dict[str, Any]]) -> str:
    """Formats the scores on one line, with the difference and its interval."""
    return "  ".join(
        f"{name} {m['trained']:.4f} -> {m['served']:.4f} "
        f"({m['delta']:+.4f}, {m['ci95'][0]:+.4f} to {m['ci95'][1]:+.4f})"
        for name, m in metrics.items()
    )


def describe(row: dict[str, Any]) -> str:
    """Formats one line of the table."""
    return (
        f"{row['run']:16s} {row['served']:46s} delta/W {row['delta']:.3f}  corr {row['correlation']:.3f}  "
        f"gain {row['gain']:.3f}  {describe_pair(row['metrics'])}  "
        f"trained {row['train_s']:.0f} s, quantizing {row['packing_s']:.1f} s"
    )


def main() -> None:
    """Trains, merges, scores and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/merges"), help="folder of the runs")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--metrics", nargs="+", default=["bits_per_byte"])
    options = parser.parse_args()
    flags = [f"--train.num_steps={options.steps}", f"--optim.lr={options.lr}", "--train.save_every=0"]
    sources = ({"path": "examples/demo/heldout.jsonl"},)
    task = TaskConfig.model_validate(
        {"sources": sources, "metrics": tuple(options.metrics), "num_samples": options.samples, "max_new_tokens": 96}
    )
    began = time.monotonic()
    rows = compare_routes(options.out, options.runs, flags, task, lambda line: print(line, flush=True))
    (options.out / "merges.json").write_text(json.dumps(rows, indent=1))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
