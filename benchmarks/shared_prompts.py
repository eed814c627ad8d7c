"""Speed of an update whose prompts are computed once, over one that repeats the prompt for each answer.

    python -m benchmarks.shared_prompts --threads 2

Both sides train the same LoRA adapters with the same fused layers: forward, the output layer on the tokens of the
answers, and backward. The loss weighs each answer differently, as losses over pairs and groups do. Steps alternate, and
the median of the faster half counts. Two floors: the ratio of the tokens, which everything but attention and the output
layer can reach; and, from it, the ratio of the whole step if the output layer, whose work is the same on both sides,
takes the measured share of a repeated step and attention gains as much as the rest.

``--trl`` adds TRL's step of DPO on the same documents, each read once: half of the answers of a row are chosen, half
rejected, without padding, with PEFT's LoRA of the same rank and TRL's own loss and fused output layer. It needs an
interpreter with ``trl`` and ``peft``. The reference is left out on all sides: its values are stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, PretrainedConfig

from ingle import adapters, models
from ingle.config import LoraAdapter, ModelConfig
from ingle.data import IGNORE_INDEX, Batch, Sample, collate, round_up
from ingle.data.shared_prompts import share
from ingle.objectives.token_loss import head_logps

#: Tokens of a prompt, tokens of an answer, answers.
CASES = ((512, 128, 2), (512, 128, 4), (512, 128, 8), (1024, 64, 2), (1024, 64, 4), (1024, 64, 8))


def make_samples(prompt: int, answer: int, count: int, num_tokens: int, vocab_size: int) -> list[Sample]:
    """Returns about ``num_tokens`` random tokens in rows of ``count`` documents with a common prompt."""
    generator = np.random.default_rng(0)
    samples = []
    for row in range(max(1, round(num_tokens / (count * (prompt + answer))))):
        start = generator.integers(3, vocab_size, prompt, dtype=np.int32)
        for _ in range(count):
            ids = np.concatenate([start, generator.integers(3, vocab_size, answer, dtype=np.int32)])
            labels = np.where(np.arange(len(ids)) < prompt, IGNORE_INDEX, ids).astype(np.int32)
            samples.append(Sample(ids, labels, {"group_ids": np.array([row])}))
    return samples


def step(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Returns the log-probabilities of the answers, and the gradients of their weighted sum."""
    trained = [parameter for _, parameter in adapters.trainable_parameters(model)]
    hidden_1NH = models.forward_hidden(model, batch)
    logps_N = models.through_head(model, head_logps, hidden_1NH[0], batch.next_labels())
    sums = torch.stack([part.sum() for part in logps_N.split(batch.cu_seqlens.diff().tolist())])[batch.answers()]
    gradients = torch.autograd.grad((sums * torch.linspace(1, -0.7, len(sums))).sum(), trained)
    return sums.detach(), list(gradients)


def head_step(model: Any, batch: Batch) -> None:
    """Computes the output layer alone, forward and backward."""
    hidden_NH = torch.zeros(batch.input_ids.shape[1], model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    models.through_head(model, head_logps, hidden_NH, batch.next_labels()).sum().backward()


def trl_step(folder: str, samples: list[Sample], options: argparse.Namespace) -> Callable[[], None]:
    """Returns TRL's step of DPO on the documents of rows of equal lengths, in one padded batch."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    # What TRL's trainer asks for.
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples])).long()
    answers = torch.from_numpy(np.stack([sample.labels for sample in samples]) != IGNORE_INDEX).long()
    order = torch.cat([torch.arange(0, len(ids), 2), torch.arange(1, len(ids), 2)])  # chosen ones, then rejected ones
    half = torch.zeros(len(ids) // 2)
    inputs = {
        "input_ids": ids[order],
        "attention_mask": torch.ones_like(ids),
        "completion_mask": answers[order],
        "ref_chosen_logps": half,
        "ref_rejected_logps": half,
    }
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        beta=0.1,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        args=SimpleNamespace(),
        _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def run() -> None:
        DPOTrainer._compute_loss(trainer, model, dict(inputs), False).backward()
        model.zero_grad()

    return run


def measure(sides: dict[str, Callable[[], Any]], turns: int, clock: Callable[[], float]) -> dict[str, float]:
    """Returns the seconds of each side, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, work in sides.items():
            start = clock()
            work()
            if turn:  # the first warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(sorted(taken)[: max(1, turns // 2)]) for name, taken in seconds.items()}


def compare(model: Any, folder: str, case: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Measures one case."""
    samples = make_samples(*case, options.tokens, model.config.vocab_size)
    batches = {"repeated": round_up(collate(samples)), "shared": round_up(collate(share(samples)))}
    found = {name: step(model, batch) for name, batch in batches.items()}
    (logps, gradients), (own_logps, own_gradients) = found["repeated"], found["shared"]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(own_gradients, gradients, strict=True)]
    clock = time.process_time if options.processor_time else time.perf_counter
    sides: dict[str, Callable[[], Any]] = {name: lambda b=batch: step(model, b) for name, batch in batches.items()}
    if options.trl:
        sides["trl"] = trl_step(folder, samples, options)
    sides["head"] = lambda: head_step(model, batches["repeated"])
    seconds = measure(sides, options.turns, clock)
    tokens = {name: batch.num_tokens for name, batch in batches.items()}
    ratio = tokens["repeated"] / tokens["shared"]
    head = seconds["head"] / seconds["repeated"]
    return {
        "case": case,
        "tokens": tokens,
        "seconds": seconds,
        "speed": seconds["repeated"] / seconds["shared"],
        "speed_of_trl": seconds["trl"] / seconds["shared"] if options.trl else None,
        "token_ratio": ratio,
        "head_share": head,
        "floor": 1 / ((1 - head) / ratio + head),
        "logps_error": float((own_logps - logps).abs().max() / logps.abs().max()),
        "gradient_error": max(errors),
    }


def make_config(options: argparse.Namespace) -> PretrainedConfig:
    """Returns the config of a Llama, or of a Mamba 2 of about the same width."""
    sizes = {"vocab_size": options.vocab, "hidden_size": options.width, "num_hidden_layers": options.layers}
    if options.recurrent:
        return Mamba2Config(**sizes, num_heads=options.width // 32, head_dim=64, n_groups=1, state_size=64)
    heads = {"num_attention_heads": options.width // 64, "num_key_value_heads": max(1, options.width // 192)}
    return LlamaConfig(**sizes, **heads, intermediate_size=options.width * 8 // 3, max_position_embeddings=4096)


def main() -> None:
    """Prints the ratio of the two sides for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2560, help="about so many tokens with repeated prompts")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first cases")
    parser.add_argument("--recurrent", action="store_true", help="a Mamba 2, whose answers continue from its states")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a busy machine")
    parser.add_argument("--trl", action="store_true", help="also time TRL, which must be installed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(make_config(options)).save_pretrained(folder)
        model = models.load_model(ModelConfig(id=folder, dtype=options.dtype))
        run_cases(model, folder, options)


def run_cases(model: Any, folder: str, options: argparse.Namespace) -> None:
    """Measures and prints every case.

    Args:
        model: The model.
        folder: Where its weights are.
        options: Those of the command.
    """
    records = []
    adapters.attach(model, LoraAdapter(rank=16), seed=0)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter.normal_(std=0.02)
    model.train()
    assert adapters.fuse(model).fused == (0 if options.recurrent else options.layers)
    for case in CASES[: options.cases]:
        found = compare(model, folder, case, options)
        records.append(found)
        tokens, seconds = found["tokens"], found["seconds"]
        print(
            f"{case[0]}:{case[1]} x {case[2]}  {tokens['repeated']} -> {tokens['shared']} tokens "
            f"({found['token_ratio']:.2f} x)  {seconds['repeated']:.3f} -> {seconds['shared']:.3f} s  "
            f"{found['speed']:.2f} x (floor {found['floor']:.2f} x, head {found['head_share']:.0%})  "
            f"errors {found['logps_error']:.0e}, {found['gradient_error']:.0e}"
            + (f"  TRL {seconds['trl']:.3f} s, {found['speed_of_trl']:.2f} x" if options.trl else ""),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
