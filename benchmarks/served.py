"""Compares the scores of a trained model with those of its export in llama.cpp.

    taskset -c 0,1 python -m benchmarks.served --out runs/served

Trains the demo's task on the bundled base in several formats and exports each run to GGUF. llama.cpp answers the same
held-out samples greedily from that file, and its answers are compared pair by pair with those of the trained model. The
last row is the usual path: an adapter trained on NF4, merged into the 16-bit originals and quantized to Q4_K_M by
llama.cpp. Needs ``ingle[llama]``.
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
from ingle.export.llama import LlamaCpp, require

CONFIG = Path("examples/demo/demo.yaml")
MODEL = "examples/models/ember-6m"
CONTEXT = 1024


@dataclass(frozen=True)
class Served:
    """The files that llama.cpp loads: a model, and optionally an adapter."""

    model: Path
    adapter: Path | None = None


def write_merged(run: str, folder: Path, kind: str) -> Served:
    """Exports the adapter merged into the weights of its training."""
    done = export(run, "gguf", folder / f"{kind}.gguf", type=kind, allow_loss=True)
    return Served(Path(done["path"]))


def write_apart(run: str, folder: Path, kind: str) -> Served:
    """Exports the base of the training and the adapter as two files."""
    base = export(MODEL, "gguf", folder / "base" / f"{kind}.gguf", type=kind)
    adapter = export(run, "gguf-adapter", folder / "lora" / "adapter.gguf")
    return Served(Path(base["path"]), Path(adapter["path"]))


def write_usual(run: str, folder: Path, kind: str) -> Served:
    """Merges the adapter into the 16-bit originals, which llama.cpp then quantizes."""
    adapter = export(run, "peft", folder / "peft")["path"]
    merged = folder / "merged"
    _merge_with_peft(adapter, merged)
    wide = export(str(merged), "gguf", folder / "f16.gguf", type="f16")["path"]
    narrow = folder / f"{kind}.gguf"
    binding = require()
    params = binding.llama_model_quantize_default_params()
    params.ftype = getattr(binding, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if binding.llama_model_quantize(str(wide).encode(), str(narrow).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {wide}.")
    return Served(narrow)


def _merge_with_peft(adapter: str, out: Path) -> None:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(out)


@dataclass(frozen=True)
class Way:
    """A way from training to serving.

    Attributes:
        name: Name of the run and of its folder.
        flags: Flags of the training.
        kind: The served file type.
        write: Writes the served files.
        said: Description of the way.
    """

    name: str
    flags: tuple[str, ...]
    kind: str
    write: Callable[[str, Path, str], Served]
    said: str


NF4 = ("--base=nf4",)
WAYS = {
    "q4_k_m": Way("q4_k_m", ("--base=q4_k_m",), "q4_k_m", write_apart, "adapter next to the same q4_k_m file"),
    "q4_k_m-aware": Way(
        "q4_k_m-aware",
        ("--base=q4_k_m", "--adapter.merge_aware.fraction=0.25"),
        "q4_k_m",
        write_merged,
        "merged and quantized again to q4_k_m, trained for it",
    ),
    "q5_1-qa": Way(
        "q5_1-qa",
        ("--base=q5_1", "--adapter.kind=qa_lora", "--adapter.train_rounding=true"),
        "q5_1",
        write_merged,
        "folded into q5_1's offsets",
    ),
    "nf4": Way("nf4", NF4, "q8_0", write_merged, "merged, quantized to q8_0"),
    "hqq-3": Way("hqq-3", ("--base={format: hqq, bits: 3}",), "q8_0", write_merged, "merged, quantized to q8_0"),
    "tq2_0": Way("tq2_0", ("--base=tq2_0",), "tq2_0", write_apart, "adapter next to the same tq2_0 file"),
    "usual": Way("nf4", NF4, "q4_k_m", write_usual, "merged into 16 bit, quantized to Q4_K_M by llama.cpp"),
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


def measure(way: Way, label: str, folder: Path, flags: list[str], task: TaskConfig) -> dict[str, Any]:
    """Trains, exports, serves and compares one way."""
    run = str(folder / way.name)
    flow.finetune(load_run(CONFIG, [*way.flags, "--evaluate=null", f"--output={run}", *flags]).run)
    target = folder / "files" / label
    target.mkdir(parents=True, exist_ok=True)
    served = way.write(run, target, way.kind)
    engine = inference.open_model(run)
    trained = evaluation.run_task(evaluation.ModelSource(engine.model, engine.tokenizer), task)
    compared = evaluation.compare(trained, answer(served, engine.tokenizer, engine.model, task), task)
    same = sum(sample.base == sample.tuned for sample in compared.samples)
    return {
        "way": label,
        "said": way.said,
        "bytes": served.model.stat().st_size + (served.adapter.stat().st_size if served.adapter else 0),
        "same_answers": same,
        "n": compared.n,
        "metrics": pair(compared.metrics),
    }


def describe(row: dict[str, Any]) -> str:
    """Returns a line of the table."""
    scores = describe_pair(row["metrics"])
    same = f"{row['same_answers']}/{row['n']} answers the same"
    return f"{row['way']:13s} {row['said']:52s} {row['bytes'] / 2**20:5.1f} MiB  {same}  {scores}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/served-ways"), help="folder of runs and files")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, help="training steps; the demo's by default")
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
    for label in options.ways:
        rows.append(measure(WAYS[label], label, options.out, flags, task))
        print(describe(rows[-1]), flush=True)
    (options.out / "served.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
