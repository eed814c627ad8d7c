"""Takes LoRA training steps with Ingle and with transformers + PEFT, each in a child process.

:class:`Side` starts such a process, which runs :func:`answer_steps`. All sides start from the same weights and
use the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MIB = 1 << 20
#: Steps that a side takes in a row; the first of them is not counted.
STEPS_PER_TURN = 3


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    vocab_size: int = 32000
    rank: int = 16
    num_documents: int = 4
    document_len: int = 512
    tie_word_embeddings: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens per step."""
        return self.num_documents * self.document_len

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features of the linear layers of a decoder layer."""
        h, i = self.hidden_size, self.intermediate_size
        kv = h // self.num_attention_heads * self.num_key_value_heads
        return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (i, h), "up": (i, h), "down": (h, i)}


#: For tests of the scripts; too small for figures.
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
#: The shape of Llama 3 8B.
LLAMA_8B = Shape(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    num_documents=4,
    document_len=1024,
    tie_word_embeddings=False,
)
#: A quarter of the layers of Llama 3 70B, so that its bfloat16 weights fit an ordinary disk.
LLAMA_70B_QUARTER = replace(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=20, num_attention_heads=64
)
SHAPES = {"small": Shape(), "tiny": TINY, "llama-8b": LLAMA_8B, "llama-70b-quarter": LLAMA_70B_QUARTER}


def make_model(shape: Shape, folder: Path) -> None:
    """Writes a random model, one layer at a time, so that it need not fit into memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = asdict(shape)
    config = LlamaConfig(
        **{key: fields[key] for key in fields if key not in ("rank", "num_documents", "document_len")},
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, dict[str, Any]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = None
    for file, names in files.items():
        for name in names:
            ones = torch.ones(shapes[name], dtype=torch.bfloat16)
            random = torch.empty(shapes[name] if len(shapes[name]) == 2 else 0, dtype=torch.bfloat16, device=device)
            names[name] = ones if len(shapes[name]) == 1 else random.normal_(0, 0.02, generator=generator).cpu()
        save_file(names, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(names))
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _ids(shape: Shape, step: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape.vocab_size, (shape.num_documents, shape.document_len), generator=generator)


def prepare_ingle(
    shape: Shape,
    folder: Path,
    base: str,
    dtype: Any,
    layers: str = "fused",
    *,
    device: str = "cpu",
    recompute: bool = False,
) -> Callable[[int], float]:
    """Assembles what ``ingle train`` does, on random tokens, and returns the step.

    ``layers`` is ``fused`` as in a run, ``eager`` without fused layers, or ``compiled`` by torch.compile instead.
    """
    import torch
    from pydantic import TypeAdapter

    from benchmarks.dtypes import word
    from ingle import adapters, models, parallel, quant
    from ingle.config import BaseConfig, LoraAdapter, ModelConfig, OptimConfig, ParallelConfig
    from ingle.data.types import Sample
    from ingle.objectives import NextTokenLoss, PackedObjective
    from ingle.training.compiling import compile_layers
    from ingle.training.groups import parameter_groups
    from ingle.training.optim import Optimizer
    from ingle.training.steps import take_step

    config, adapter = ModelConfig(id=str(folder), dtype=word(dtype)), LoraAdapter(rank=shape.rank)
    optim = OptimConfig()
    section: Any = {"device": device, "num_threads": torch.get_num_threads()}
    mesh = parallel.start(ParallelConfig(**section))
    model: Any = models.meta_model(config, mesh.device, dtype)
    quant.convert(model, TypeAdapter(BaseConfig).validate_python({"format": base}))
    models.load_weights(model, config, mesh.device, dtype)
    adapters.attach(model, adapter, seed=0)
    if recompute:
        models.recompute_layers(model)
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
    objective = PackedObjective(
        NextTokenLoss(model),
        documents,
        order,
        global_batch_size=shape.num_documents,
        micro_batch_size=shape.num_documents,
        mesh=mesh,
    )
    optimizer = Optimizer(parameter_groups(model, adapter, optim), optim)

    def step(number: int) -> float:
        return take_step(objective, optimizer, mesh, lr=optim.lr, seed=0, step=number + 1).loss

    return step


def prepare_peer(
    shape: Shape,
    folder: Path,
    base: str,
    dtype: Any,
    lora_dtype: str,
    *,
    device: str = "cpu",
    recompute: bool = False,
    liger: bool = False,
) -> Callable[[int], float]:
    """Assembles the same with transformers + PEFT (+ bitsandbytes) and their defaults, and returns the step.

    With ``liger``, Liger's kernels replace parts of transformers, as its documentation recommends.
    """
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    config = peft.LoraConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=lora_dtype == "float32")
    return _peer_step(shape, model, device)


def prepare_unsloth(shape: Shape, folder: Path, *, recompute: bool) -> Callable[[int], float]:
    """Assembles the same with Unsloth, which needs a CUDA device and quantizes to NF4."""
    from unsloth import FastLanguageModel

    length = shape.document_len
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=length, load_in_4bit=True)
    names = [f"{name}_proj" for name in shape.linears]
    model = FastLanguageModel.get_peft_model(
        model,
        r=shape.rank,
        lora_alpha=2 * shape.rank,
        target_modules=names,
        use_gradient_checkpointing="unsloth" if recompute else False,
    )
    return _peer_step(shape, model, "cuda")


def _peer_step(shape: Shape, model: Any, device: str) -> Callable[[int], float]:
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        ids = _ids(shape, number).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


class Side:
    """A child process; a colon and a label after its name distinguish processes of the same kind."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: Mapping[str, str] | None = None,
        module: str = __name__,
    ) -> None:
        self.name = name
        self.steps: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from {module} import answer_steps as run; run()",
                name.split(":")[0],
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environment or {}),
        )
        self._read("ready")

    def ask(self, request: str) -> dict[str, Any]:
        """Sends a line and returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
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
        """Stops the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def take_turns(sides: Mapping[str, Side], turns: int) -> None:
    """Lets all sides take their steps in turns; the first turn is a warm-up."""
    for turn in range(1 + turns):
        for name, side in sides.items():
            answers = [side.ask("step") for _ in range(STEPS_PER_TURN)]
            if turn == 0:
                print(f"  {name:<16} loss of the first step {answers[0]['loss']:.4f}")
            else:
                side.steps += answers[1:]


def summarize(side: Side, shape: Shape) -> dict[str, Any]:
    """Returns the medians over the steps of a side."""
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


def _memory(key: str) -> int:
    """Returns ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _page_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def profile_step(step: Callable[[], float]) -> list[tuple[str, float, int]]:
    """Returns the operators of one step with their own seconds and number of calls, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    rows = [(row.key, row.self_cpu_time_total / 1e6, row.count) for row in profiler.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:24]


def answer_steps() -> None:
    """Runs the child process: takes a step for every line of input, and answers with a line of JSON."""
    import torch

    from benchmarks.dtypes import run_dtype

    parser = argparse.ArgumentParser()
    parser.add_argument("side")  # ingle, ingle-eager, ingle-compiled, peer, peer-bf16, peer-liger or unsloth
    parser.add_argument("--base", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--limit-gib", type=float, help="memory of the CUDA device that the side may use")
    options = parser.parse_args()
    shape = TINY if options.tiny else SHAPES[options.shape]
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if options.limit_gib:
        torch.cuda.set_per_process_memory_fraction(options.limit_gib * 1024 / (torch.cuda.mem_get_info()[1] / MIB))
    name, _, variant = options.side.partition("-")
    if name == "ingle":
        import ingle.flow  # noqa: F401  imports do not count as memory of a side
    else:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    imported, dtype = _memory("VmRSS"), torch.bfloat16 if on_gpu else run_dtype(options.dtype)
    place: Any = {"device": options.device, "recompute": options.recompute}
    if name == "ingle":
        step = prepare_ingle(shape, options.folder, options.base, dtype, variant or "fused", **place)
    elif name == "unsloth":
        step = prepare_unsloth(shape, options.folder, recompute=options.recompute)
    else:
        lora_dtype = "bfloat16" if variant == "bf16" else "float32"
        step = prepare_peer(shape, options.folder, options.base, dtype, lora_dtype, **place, liger=variant == "liger")
    # Resets the peak, because the memory of training is compared, not that of loading.
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _memory("VmRSS")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        imported, loaded = 0, torch.cuda.memory_allocated()
    print("ready", flush=True)
    number = 0
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps({"profile": profile_step(lambda at=number: step(at))}), flush=True)
            continue
        before, start = _page_faults(), time.perf_counter()
        loss = step(number)  # reads the loss, so it waits for the device
        if on_gpu:
            torch.cuda.synchronize()
        answer = {"seconds": time.perf_counter() - start, "loss": loss, "faults": _page_faults() - before}
        peak = torch.cuda.max_memory_allocated() if on_gpu else _memory("VmHWM")
        memory = {"peak": peak - imported, "weights": loaded - imported}
        print(json.dumps(answer | memory), flush=True)
        number += 1
