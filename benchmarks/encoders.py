"""Compares the speed of full fine-tuning of an encoder with Ingle and with transformers' ``Trainer``, on ragged text.

    taskset -c 0,1 python -m benchmarks.encoders --objective mlm --texts wikitext --threads 2

The model has the shape of BERT-base and random weights. Texts have the lengths of real ones: lines of wikitext-2 or
sentences of sentence_polarity, in their order, but random words, so that no vocabulary is needed. A step has the same
documents on both sides. ``Trainer`` pads them to the longest, as its collators do by default, and runs its own data
loader, ``training_step``, clipping and AdamW; Ingle does what ``ingle train`` does. Dropout is off on both sides. With
bfloat16, ``Trainer`` computes under autocast over float32 weights, and Ingle keeps float32 masters.

Each side runs in its own process, and they take turns. The script prints the medians over the steps after warm-up in
real tokens per second, their ratio, and the floor: the time of the step's matrix products without any padding, at the
rate at which this machine multiplies such matrices. It covers no norms, no activations and no update of the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.dtypes import run_dtype, word
from benchmarks.lora_steps import Side

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
TEXTS = {
    "wikitext": ("wikitext-2/valid.txt",),
    "sentences": ("sentence_polarity/rt-polarity.pos", "sentence_polarity/rt-polarity.neg"),
}
MAX_LEN = 512
NUM_DOCUMENTS = 4096
RATE = 0.15
LR = 5e-5
#: Steps that a side takes in a row; the first of them is not counted.
STEPS_PER_TURN = 3

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30522,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
}


def read_lengths(texts: str, data: Path) -> list[int]:
    """Returns the numbers of tokens of real texts in GPT-2's vocabulary, without special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "gpt2-tokenizer" / "tokenizer.json"))
    files = [(data / name).read_text(encoding="utf-8").splitlines() for name in TEXTS[texts]]
    lines = [line.strip() for pair in zip(*files, strict=False) for line in pair if line.strip()]
    encodings = tokenizer.encode_batch(lines[:NUM_DOCUMENTS], add_special_tokens=False)
    return [min(len(encoding.ids), MAX_LEN - 2) for encoding in encodings]


def write_inputs(folder: Path, shape: dict[str, int], lengths: list[int]) -> None:
    """Writes a random model, a tokenizer of whole words, and texts of these lengths with a label."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    dropout: dict[str, Any] = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    BertForMaskedLM(BertConfig(**shape, **dropout, max_position_embeddings=MAX_LEN)).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{number}" for number in range(shape["vocab_size"] - len(special))]
    vocabulary = {token: number for number, token in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LEN, **names).save_pretrained(folder)
    rng = Random(0)
    with (folder / "texts.jsonl").open("w") as file:
        for number, length in enumerate(lengths):
            text = " ".join(rng.choices(words, k=length))
            file.write(json.dumps({"text": text, "label": ("no", "yes")[number % 2]}) + "\n")


def prepare_ingle(folder: Path, options: argparse.Namespace) -> Callable[[int], float]:
    """Assembles what ``ingle train`` does, and returns the step."""
    import torch

    from ingle.assembly import assemble
    from ingle.config.loader import run_from_yaml
    from ingle.training.steps import take_step

    run = run_from_yaml(
        f"""
        model: {{id: {folder}, dtype: {options.dtype}}}
        base: {{format: none}}
        adapter: {{kind: none}}
        data:
          sources: [{{path: {folder}/texts.jsonl, layout: {"text" if options.objective == "mlm" else "labelled"}}}]
          max_seq_len: {MAX_LEN}
          packing: false
          shuffle: false
        objective: {{kind: {options.objective}}}
        optim: {{lr: {LR}, weight_decay: 0.0, max_grad_norm: 1.0}}
        train: {{num_steps: 1000, global_batch_size: {options.batch}, micro_batch_size: {options.batch},
                compile: {options.compile}}}
        parallel: {{device: cpu, num_threads: {torch.get_num_threads()}}}
        output: {folder}/run
        """
    )
    parts = assemble(run, lambda event: None)
    parts.objective.module.train()

    def step(number: int) -> float:
        return take_step(parts.objective, parts.optimizer, parts.mesh, lr=LR, seed=0, step=number + 1).loss

    return step


def prepare_trainer(folder: Path, options: argparse.Namespace) -> Callable[[int], float]:
    """Makes a ``Trainer`` with the collator of the objective, and returns the step of its loop."""
    import torch
    from transformers import (
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    encoded = [{"input_ids": ids} for ids in tokenizer([row["text"] for row in rows])["input_ids"]]
    collator: Any
    if options.objective == "mlm":
        model = AutoModelForMaskedLM.from_pretrained(folder)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        collator = DataCollatorWithPadding(tokenizer)
        encoded = [each | {"labels": int(row["label"] == "yes")} for each, row in zip(encoded, rows, strict=True)]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(encoded)  # type: ignore[arg-type]

    settings: dict[str, Any] = {"output_dir": str(folder / "trainer"), "report_to": [], "use_cpu": True}
    trainer = InOrder(
        model,
        TrainingArguments(
            **settings,
            per_device_train_batch_size=options.batch,
            learning_rate=LR,
            lr_scheduler_type="constant",
            bf16=options.dtype == "bfloat16",
        ),
        data_collator=collator,
        train_dataset=encoded,  # type: ignore[arg-type]
    )
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    batches = iter(trainer.get_train_dataloader())
    optimizer: Any = trainer.optimizer
    model.train()

    def step(number: int) -> float:
        loss = trainer.training_step(model, next(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def answer_steps() -> None:
    """Runs a child process: takes a step for every line of input, and answers with a line of JSON."""
    import torch

    options = parse(["", *sys.argv[2:]])
    torch.set_num_threads(options.threads)
    prepare = {"ingle": prepare_ingle, "trainer": prepare_trainer}[sys.argv[1]]
    step = prepare(options.folder, options)
    print("ready", flush=True)
    number = 0
    for line in sys.stdin:
        if line.strip() == "profile":
            from benchmarks.lora_steps import profile_step

            print(json.dumps({"profile": profile_step(lambda at=number: step(at))}), flush=True)
            continue
        start, busy = time.perf_counter(), time.process_time()
        loss = step(number)
        answer = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - busy, "loss": loss}
        print(json.dumps(answer), flush=True)
        number += 1


def floor_seconds(shape: dict[str, int], lengths: list[int], objective: str, dtype: Any) -> tuple[float, float]:
    """Returns the time of the matrix products of a step with documents of these lengths, and their FLOP.

    Forward takes 2 FLOP per weight and token, and backward twice as many. The output layer of ``mlm`` is needed at the
    chosen tokens alone. Attention has 2 products per pair of tokens in forward and 4 in backward.
    """
    import torch

    from benchmarks.finetune import fastest_half

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    real = [length + 2 for length in lengths]
    weights = {"attention": 4 * hidden * hidden, "mlp": 2 * hidden * inner}
    flops = {name: 6.0 * size * sum(real) * shape["num_hidden_layers"] for name, size in weights.items()}
    if objective == "mlm":
        flops["head"] = 6.0 * RATE * sum(lengths) * hidden * (shape["vocab_size"] + hidden)
    pairs = 12.0 * sum(length * length for length in real) * hidden * shape["num_hidden_layers"]
    seconds = 0.0
    for name, outputs, inputs in (("attention", hidden, hidden), ("mlp", inner, hidden), ("head", hidden, hidden)):
        n = sum(real)
        x, w = torch.randn(n, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        y, gx, gw = torch.empty(n, outputs, dtype=dtype), torch.empty_like(x), torch.empty_like(w)

        def products(x: Any = x, w: Any = w, y: Any = y, gx: Any = gx, gw: Any = gw) -> None:
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=gx)
            torch.mm(y.t(), x, out=gw)

        seconds += flops.get(name, 0.0) * fastest_half(products) / (6.0 * n * outputs * inputs)
    total = sum(flops.values())
    return seconds * (total + pairs) / total, total + pairs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--objective", choices=("mlm", "classify"), default="mlm")
    parser.add_argument("--texts", choices=list(TEXTS), default="wikitext", help="the lengths of the documents")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real texts")
    parser.add_argument("--batch", type=int, default=32, help="documents per step")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: of a run here")
    parser.add_argument("--turns", type=int, default=3, help="turns of three steps per side, after one warm-up turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", choices=("auto", "true", "false"), default="auto", help="train.compile of Ingle")
    parser.add_argument("--profile", action="store_true", help="print the operators of a step of Ingle")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tiny", action="store_true", help="use a small model, to test the script")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the command line."""
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    dtype = run_dtype(options.dtype)
    shape, lengths = TINY if options.tiny else SHAPE, read_lengths(options.texts, options.data)
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), shape, lengths)
        arguments = ["--objective", options.objective, "--dtype", word(dtype), "--batch", str(options.batch)]
        arguments += ["--threads", str(options.threads), "--folder", name, "--compile", options.compile]
        sides = {side: Side(side, arguments, module=__spec__.name) for side in ("ingle", "trainer")}
        steps: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(1 + options.turns):
            for side in sides:
                steps[side] += [sides[side].ask("step") for _ in range(STEPS_PER_TURN)]
        if options.profile:
            for key, seconds, calls in sides["ingle"].ask("profile")["profile"]:
                print(f"    {seconds * 1e3:8.1f} ms {calls:6d} x {key}")
        for each in sides.values():
            each.close()
    taken = len(steps["ingle"])
    counted = [step for step in range(STEPS_PER_TURN, taken) if step % STEPS_PER_TURN]
    parts = [lengths[step * options.batch : (step + 1) * options.batch] for step in range(taken)]
    floors = {step: floor_seconds(shape, parts[step], options.objective, dtype) for step in counted}
    figures: dict[str, Any] = {"objective": options.objective, "texts": options.texts, "dtype": word(dtype)}
    real = {step: sum(parts[step]) + 2 * len(parts[step]) for step in counted}
    padded = {step: (max(parts[step]) + 2) * len(parts[step]) for step in counted}
    print(
        f"{options.objective} on {options.texts}, {word(dtype)}, {options.batch} documents per step: "
        f"{statistics.mean(real.values()):.0f} real tokens, {statistics.mean(padded.values()):.0f} with padding"
    )
    for side, taken_steps in steps.items():
        speeds = [real[step] / taken_steps[step]["seconds"] for step in counted]
        shares = [floors[step][0] / taken_steps[step]["seconds"] for step in counted]
        cpu = statistics.median(real[step] / taken_steps[step]["cpu"] for step in counted)
        figures[side] = {"tokens_per_s": statistics.median(speeds), "floor_share": statistics.median(shares)}
        figures[side] |= {"tokens_per_cpu_s": cpu}
        print(
            f"  {side:<8} {statistics.median(speeds):7.0f} tokens/s  {statistics.median(shares):5.0%} of the floor  "
            f"{cpu:7.0f} tokens per second of processor time  loss of the first step {taken_steps[0]['loss']:.4f}"
        )
    ratios = [steps["trainer"][step]["seconds"] / steps["ingle"][step]["seconds"] for step in counted]
    figures["ratio"] = statistics.median(ratios)
    figures["floor_tokens_per_s"] = statistics.median(real[step] / floors[step][0] for step in counted)
    print(f"  floor    {figures['floor_tokens_per_s']:7.0f} tokens/s")
    print(f"  ratio {figures['ratio']:.2f} x")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
