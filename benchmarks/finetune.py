"""LoRA fine-tuning speed and memory: Ingle beside transformers + PEFT, in one run on one machine.

    taskset -c 0,1 python -m benchmarks.finetune --base none nf4 --threads 2

Both start from the same weights, take the same tokens and do whole optimizer steps, each in a process of its
own, turn by turn, so that a busy machine slows both. A turn is three steps in a row, as training takes them, and the
first of them, which finds caches and clocks as the other side left them, is not counted. Printed are medians over the
steps after warm-up, the ratio of the two, peak memory, and the floor: the time the step's matrix products would take at
the rate this machine multiplies such matrices at, with all else free. Both compute in the type that a run would take
here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
#: Steps a side takes in a row; the first of them is not counted.
STEPS_OF_A_TURN = 3


@dataclass(frozen=True)
class Shape:
    """The model and the step."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    vocab_size: int = 32000
    rank: int = 16
    num_documents: int = 4
    document_len: int = 512

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.num_documents * self.document_len

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Out and in features of the linear maps of a layer."""
        h, i = self.hidden_size, self.intermediate_size
        kv = h // self.num_attention_heads * self.num_key_value_heads
        return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (i, h), "up": (i, h), "down": (h, i)}


#: Large enough to run, too small to say anything.
TINY = Shape(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    num_documents=2,
    document_len=64,
)


def count_flops(shape: Shape) -> dict[str, float]:
    """Multiplications and additions that a step cannot do without, by part.

    Forward and the gradient of the input take 2 each per weight and token; frozen weights need no gradient, and
    neither does the input of the first layer's q, k and v. Causal attention has half of its T^2 pairs: 2 products
    forward, 4 backward (the scores are not counted again, though both sides compute them twice).
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


def measure_matmul_rate(shape: Shape, dtype: Any) -> dict[str, float]:
    """Rate of products of a type in the shapes of the step, in FLOP/s, by shape; outputs reused."""
    import torch

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

        rates[name] = 4 * rows * o * i / _fastest_half(both)
    return rates


def floor_seconds(shape: Shape, rates: dict[str, float]) -> float:
    """Time of the step's products at the measured rates; attention and adapters at the mean rate."""
    flops = count_flops(shape)
    n, layers = shape.num_tokens, shape.num_hidden_layers
    seconds = 0.0
    for name, (o, i) in shape.linears.items():
        passes = 2 * layers - (name in "qkv")
        seconds += passes * 2 * n * o * i / rates[f"{o}x{i}"]
    mean = flops["frozen linears"] / seconds
    return seconds + flops["head"] / rates["head"] + (flops["adapters"] + flops["attention"]) / mean


def _fastest_half(work: Callable[[], None], repeats: int = 12) -> float:
    """Median of the faster half of the repeats, in seconds: other programs only ever slow one down."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[: repeats // 2])


# --- the two sides ---------------------------------------------------------------------------------------------


def make_model(shape: Shape, folder: Path) -> None:
    """Writes the random model both sides start from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = asdict(shape)
    config = LlamaConfig(
        **{key: fields[key] for key in fields if key not in ("rank", "num_documents", "document_len")},
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def _ids(shape: Shape, step: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape.vocab_size, (shape.num_documents, shape.document_len), generator=generator)


def prepare_ingle(shape: Shape, folder: Path, base: str, dtype: Any, layers: str = "fused") -> Callable[[int], float]:
    """What ``ingle train`` assembles, around a data set of random tokens; returns the step.

    ``layers``: ``fused`` as it runs; ``eager`` without fused layers; ``compiled`` with torch.compile instead.
    """
    import torch
    from pydantic import TypeAdapter

    from benchmarks.dtypes import word
    from ingle import adapters, models, parallel, quant
    from ingle.config import BaseConfig, LoraAdapter, ModelConfig, OptimConfig, ParallelConfig
    from ingle.data.types import Sample
    from ingle.objectives import LanguageModelling, NextTokenLoss
    from ingle.training.compiling import compile_layers
    from ingle.training.groups import parameter_groups
    from ingle.training.optim import Optimizer
    from ingle.training.steps import take_step

    config, adapter = ModelConfig(id=str(folder), dtype=word(dtype)), LoraAdapter(rank=shape.rank)
    optim = OptimConfig()
    mesh = parallel.start(ParallelConfig(device="cpu", num_threads=torch.get_num_threads()))
    device = mesh.device
    model: Any = models.meta_model(config, device, dtype)
    quant.convert(model, TypeAdapter(BaseConfig).validate_python({"format": base}))
    models.load_weights(model, config, device, dtype)
    adapters.attach(model, adapter, seed=0)
    if layers == "fused":
        report = adapters.fuse(model)
        print(f"  {report}", file=sys.stderr)
    elif layers == "compiled":
        compile_layers(model)
    model.train()

    class Documents:
        def sample(self, index: int) -> Sample:
            ids = _ids(shape, index // shape.num_documents)[index % shape.num_documents].numpy().astype("int32")
            labels = ids.copy()
            labels[0] = -100
            return Sample(ids, labels)

    class InOrder:
        def __len__(self) -> int:
            return 1

        def take(self, counter: int, n: int) -> list[list[int]]:
            return [[counter + k] for k in range(n)]

    documents: Any = Documents()
    order: Any = InOrder()
    objective = LanguageModelling(
        NextTokenLoss(model),
        documents,
        order,
        global_batch_size=shape.num_documents,
        micro_batch_size=shape.num_documents,
        device=device,
    )
    optimizer = Optimizer(parameter_groups(model, adapter, optim), optim)

    def step(number: int) -> float:
        return take_step(objective, optimizer, mesh, lr=optim.lr, seed=0, step=number + 1).loss

    return step


def prepare_peer(shape: Shape, folder: Path, base: str, dtype: Any, lora_dtype: str) -> Callable[[int], float]:
    """The same in transformers + PEFT (+ bitsandbytes), with their defaults; returns the step."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    config = peft.LoraConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=lora_dtype == "float32")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        ids = _ids(shape, number)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


# --- processes -------------------------------------------------------------------------------------------------


def _memory(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def work(side: str, shape: Shape, options: argparse.Namespace) -> None:
    """A child process: takes a step whenever a line comes in, and answers with a line of JSON."""
    import torch

    from benchmarks.dtypes import run_dtype

    torch.set_num_threads(options.threads)
    folder, base, dtype = options.folder, options.base[0], run_dtype(options.dtype)
    if side.startswith("ingle"):
        import ingle.flow  # noqa: F401  imports are not part of the memory compared
    else:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    imported = _memory("VmRSS")
    if side.startswith("ingle"):
        step = prepare_ingle(shape, folder, base, dtype, side.partition("-")[2] or "fused")
    else:
        step = prepare_peer(shape, folder, base, dtype, "bfloat16" if side == "peer-bf16" else "float32")
    # What loading needed at its peak is forgotten: compared is what training needs.
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _memory("VmRSS")
    print("ready", flush=True)
    number = 0
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps({"profile": _profile(lambda at=number: step(at))}), flush=True)
            continue
        before = _page_faults()
        start = time.perf_counter()
        loss = step(number)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "loss": loss, "faults": _page_faults() - before}
        memory = {"peak": _memory("VmHWM") - imported, "weights": loaded - imported}
        print(json.dumps(answer | memory), flush=True)
        number += 1


def _page_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _profile(step: Callable[[], float]) -> list[tuple[str, float, int]]:
    """Operators of one step by their own time, in seconds and calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    rows = [(row.key, row.self_cpu_time_total / 1e6, row.count) for row in profiler.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:24]


class Side:
    """One child process; what follows a colon in its name tells it from others of its kind."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.steps: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.finetune", "--work", name.partition(":")[0], *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environment or {}),
        )
        self._read("ready")

    def ask(self, what: str) -> dict[str, Any]:
        """Sends a line, waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read("{"))
        return answer

    def _read(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise SystemExit(f"{self.name} ended early")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(shape: Shape, folder: Path, base: str, options: argparse.Namespace) -> dict[str, Any]:
    """Takes steps on all sides turn by turn and prints the medians."""
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


def take_turns(sides: Mapping[str, Side], turns: int) -> None:
    """Lets every side make its steps turn by turn; the first turn is for warming up."""
    for turn in range(1 + turns):
        for name, side in sides.items():
            answers = [side.ask("step") for _ in range(STEPS_OF_A_TURN)]
            if turn == 0:
                print(f"  {name:<16} loss of the first step {answers[0]['loss']:.4f}")
            else:
                side.steps += answers[1:]


def summarize(side: Side, shape: Shape) -> dict[str, Any]:
    """Medians over the steps of a side."""
    seconds = statistics.median(step["seconds"] for step in side.steps)
    spread = statistics.quantiles((step["seconds"] for step in side.steps), n=4)
    return {
        "tokens_per_s": shape.num_tokens / seconds,
        "seconds": seconds,
        "quartiles": [spread[0], spread[2]],
        "peak_mib": max(step["peak"] for step in side.steps) / MIB,
        "weights_mib": side.steps[0]["weights"] / MIB,
        "page_faults": statistics.median(step["faults"] for step in side.steps),
    }


def main() -> None:
    """Reads the arguments, runs, prints."""
    from benchmarks.dtypes import NAMES, run_dtype, word

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["none", "nf4"], help="of the base; peers know none, nf4")
    parser.add_argument(
        "--sides", nargs="+", default=["ingle", "peer"], help="ingle, ingle-eager, ingle-compiled, peer, peer-bf16"
    )
    parser.add_argument("--turns", type=int, default=4, help="of each side, three steps each, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=NAMES, help="auto: what a run would compute in here")
    parser.add_argument("--profile", action="store_true", help="operators of one step of the first side")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = TINY if options.tiny else Shape()
    if options.work:
        work(options.work, shape, options)
        return
    import torch

    torch.set_num_threads(options.threads)
    dtype = run_dtype(options.dtype)
    rates = measure_matmul_rate(shape, dtype)
    flops = count_flops(shape)
    floor = floor_seconds(shape, rates)
    print(
        f"{shape.num_documents} x {shape.document_len} tokens, {sum(flops.values()) / 1e12:.2f} TFLOP a step: "
        + ", ".join(f"{name} {value / 1e12:.3f}" for name, value in flops.items())
    )
    print(
        f"{word(dtype)} products: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()) + " GFLOP/s"
    )
    print(f"floor: {floor:.3f} s a step, {shape.num_tokens / floor:.0f} tokens/s")
    figures: dict[str, Any] = {"floor_tokens_per_s": shape.num_tokens / floor, "rates": rates}
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        for base in options.base:
            print(f"base {base}:")
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
