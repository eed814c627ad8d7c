"""Compares task scores of trained models with those of the files that llama.cpp serves.

    taskset -c 0,1 python -m benchmarks.served --out runs/served

Trains the demo's task on the bundled base in several formats, writes each run as GGUF, lets llama.cpp answer the same
held-out samples greedily, and compares its answers with those of the trained model in paired tests.  The last row is
the usual route: an adapter trained on NF4, merged into the 16-bit originals and quantized to Q4_K_M by llama.cpp's own
quantizer. Needs ``ingle[llama]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.merges import describe_pair, pair
from ingle import data, evaluation, flow, inference, models
from ingle.config import TaskConfig, load_run
from ingle.evaluation.run.windows import cut_windows, draw_scored_document, window_size
from ingle.evaluation.scorers import Likelihood, Outputs
from ingle.evaluation.tasks.samples import read_task
from ingle.evaluation.tasks.task_result import SampleText, TaskResult
from ingle.export import export
from ingle.export.verify.llama_cpp import LlamaCpp, import_binding

CONFIG = Path("examples/demo/demo.yaml")
MODEL = "examples/models/ember-6m"
CONTEXT = 1024


@dataclass(frozen=True)
class Served:
    """Files that llama.cpp loads.

    Attributes:
        model: Model file.
        adapter: LoRA file, if the adapter is not merged.
    """

    model: Path
    adapter: Path | None = None


def write_merged(run: str, folder: Path, kind: str) -> Served:
    """Writes the adapter merged into the weights it was trained on."""
    done = export(run, "gguf", folder / f"{kind}.gguf", type=kind, allow_loss=True)
    return Served(done.path)


def write_unmerged(run: str, folder: Path, kind: str) -> Served:
    """Writes the base as it was in training, and the adapter as a file of its own."""
    base = export(MODEL, "gguf", folder / "base" / f"{kind}.gguf", type=kind)
    adapter = export(run, "gguf-adapter", folder / "lora" / "adapter.gguf")
    return Served(base.path, adapter.path)


def write_usual(run: str, folder: Path, kind: str) -> Served:
    """Writes the adapter merged into the 16-bit originals, quantized by llama.cpp."""
    adapter = export(run, "peft", folder / "peft").path
    merged = folder / "merged"
    _merge_with_peft(adapter, merged)
    wide = export(str(merged), "gguf", folder / "f16.gguf", type="f16").path
    narrow = folder / f"{kind}.gguf"
    binding = import_binding()
    params = binding.llama_model_quantize_default_params()
    params.ftype = getattr(binding, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if binding.llama_model_quantize(str(wide).encode(), str(narrow).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {wide}")
    return Served(narrow)


def _merge_with_peft(adapter: str, out: Path) -> None:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(out)


@dataclass(frozen=True)
class Route:
    """A route from training to serving.

    Attributes:
        name: Name of the run and its folder.
        flags: Flags of the run.
        kind: File type that is served.
        write: Writes the files.
        description: Description of what is served.
    """

    name: str
    flags: tuple[str, ...]
    kind: str
    write: Callable[[str, Path, str], Served]
    description: str


NF4 = ("--base=nf4",)
ROUTES = {
    "q4_k_m": Route("q4_k_m", ("--base=q4_k_m",), "q4_k_m", write_unmerged, "adapter with the same q4_k_m file"),
    "q4_k_m-aware": Route(
        "q4_k_m-aware",
        ("--base=q4_k_m", "--adapter.merge_aware.fraction=0.25"),
        "q4_k_m",
        write_merged,
        "merged and quantized again to q4_k_m, trained for it",
    ),
    "q5_1-qa": Route(
        "q5_1-qa",
        ("--base=q5_1", "--adapter.kind=qa_lora", "--adapter.train_rounding=true"),
        "q5_1",
        write_merged,
        "folded into q5_1's offsets",
    ),
    "nf4": Route("nf4", NF4, "q8_0", write_merged, "merged, quantized to q8_0"),
    "hqq-3": Route("hqq-3", ("--base={format: hqq, bits: 3}",), "q8_0", write_merged, "merged, quantized to q8_0"),
    "tq2_0": Route("tq2_0", ("--base=tq2_0",), "tq2_0", write_unmerged, "adapter with the same tq2_0 file"),
    "usual": Route("nf4", NF4, "q4_k_m", write_usual, "merged into 16 bit, quantized to Q4_K_M by llama.cpp"),
}


def answer(served: Served, tokenizer: Any, model: Any, task: TaskConfig) -> TaskResult:
    """Runs the task in llama.cpp: greedy answers, and the likelihood of each reference."""
    samples = read_task(task)
    ends = models.end_token_ids(model, tokenizer)
    documents = [draw_scored_document(sample.example, tokenizer, task.system) for sample in samples]
    windows, _ = cut_windows(documents, tokenizer, window_size(model))
    with LlamaCpp(served.model, adapter=served.adapter, context=CONTEXT) as llama:
        answers = tuple(
            tokenizer.decode(
                llama.continue_greedily(
                    data.prompt_ids(tokenizer, sample.example, task.system), task.max_new_tokens, ends
                ),
                skip_special_tokens=True,
            )
            for sample in samples
        )
        likelihoods = []
        for window, sample in zip(windows, samples, strict=True):
            logits = llama.logits(window.sample.input_ids.tolist()).astype(np.float64)
            places = np.flatnonzero(window.sample.labels != data.IGNORE_INDEX)
            rows = logits[places - 1]
            rows -= rows.max(-1, keepdims=True)
            logps = rows[np.arange(len(places)), window.sample.labels[places]] - np.log(np.exp(rows).sum(-1))
            likelihoods.append(Likelihood(-float(logps.sum()), len(places), len(sample.references[0].encode())))
    return TaskResult(
        samples=tuple(SampleText(sample.example.origin, sample.prompt, sample.references) for sample in samples),
        outputs=Outputs(answers=answers, likelihoods=tuple(likelihoods)),
        num_unfinished=0,
        seconds=0.0,
    )


def measure(route: Route, label: str, folder: Path, flags: list[str], task: TaskConfig) -> dict[str, Any]:
    """Trains, writes, serves and compares one route."""
    run = str(folder / route.name)
    flow.finetune(load_run(CONFIG, [*route.flags, "--evaluate=null", f"--output={run}", *flags]).run)
    target = folder / "files" / label
    target.mkdir(parents=True, exist_ok=True)
    served = route.write(run, target, route.kind)
    engine = inference.open_model(run)
    trained = evaluation.run_task(evaluation.ModelSource(engine.model, engine.tokenizer), task)
    compared = evaluation.compare(trained, answer(served, engine.tokenizer, engine.model, task), task)
    same = sum(sample.base == sample.tuned for sample in compared.samples)
    return {
        "route": label,
        "description": route.description,
        "bytes": served.model.stat().st_size + (served.adapter.stat().st_size if served.adapter else 0),
        "same_answers": same,
        "n": compared.n,
        "metrics": pair(compared.metrics),
    }


def describe(row: dict[str, Any]) -> str:
    """Formats one line of the table."""
    scores = describe_pair(row["metrics"])
    same = f"{row['same_answers']}/{row['n']} answers the same"
    return f"{row['route']:13s} {row['description']:52s} {row['bytes'] / 2**20:5.1f} MiB  {same}  {scores}"


def main() -> None:
    """Measures and prints every named route."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/served-routes"), help="folder of runs and files")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--steps", type=int, help="steps of training; by default those of the demo")
    parser.add_argument("--samples", type=int, default=150)
    options = parser.parse_args()
    flags = [] if options.steps is None else [f"--train.num_steps={options.steps}"]
    task = TaskConfig.model_validate(
        {
            "sources": ({"path": "examples/demo/heldout.jsonl"},),
            "metrics": ("chrf", "bleu", "bits_per_byte"),
            "num_samples": options.samples,
            "max_new_tokens": 96,
        }
    )
    rows = []
    for label in options.routes:
        rows.append(measure(ROUTES[label], label, options.out, flags, task))
        print(describe(rows[-1]), flush=True)
    (options.out / "served.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
