"""Tokens per second of packed hybrid models over those of a padded batch in transformers, on texts of ragged lengths.

    python -m benchmarks.hybrids --texts ROWS.jsonl --threads 2

Both sides train LoRA adapters of the linear layers (without ``out_proj``) over frozen float32 weights: forward, loss
and backward. Ours packs the texts and deals them to the mixers; the peer (transformers, with the same adapters) gets
them as rows of a batch, in the order of the file and then grouped by length. Steps alternate, and the median of each
counts. The floor is the share of real tokens in the padded batch: a model that computes padding at the same speed
reaches it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, FalconH1Config, Mamba2Config, PretrainedConfig, Qwen3NextConfig

from ingle import adapters, models
from ingle.config import LoraAdapter, ModelConfig, NoBase
from ingle.data.batch import collate
from ingle.data.types import Sample

_BATCH = 16


def shapes(width: int, layers: int, vocab_size: int) -> dict[str, PretrainedConfig]:
    """Returns configs of hybrids of one size."""
    common = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128), "head_dim": 64}
    return {
        "mamba2": Mamba2Config(**common, num_heads=width // 32, head_dim=64, state_size=64, n_groups=1),
        "qwen3_next": Qwen3NextConfig(
            **common,
            **heads,
            intermediate_size=2 * width,
            linear_num_key_heads=width // 128,
            linear_num_value_heads=width // 64,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            mlp_only_layers=list(range(layers)),
        ),
        "falcon_h1": FalconH1Config(
            **common,
            **heads,
            intermediate_size=2 * width,
            mamba_d_ssm=width,
            mamba_n_heads=width // 64,
            mamba_d_head=64,
        ),
    }


def read_documents(path: Path, tokenizer: str, limit: int, longest: int) -> list[Tensor]:
    """Returns the token ids of the texts of a file in JSON Lines."""
    encode = models.load_tokenizer(ModelConfig(id=tokenizer))
    with path.open() as file:
        rows = [json.loads(line) for line in islice(file, limit)]
    texts = ["\n".join(str(value) for value in row.values()) for row in rows]
    return [torch.tensor(encode(text)["input_ids"][:longest]) for text in texts]


def packed_step(model: Any, documents: list[Tensor]) -> None:
    """Computes the loss of the packed documents and its gradients."""
    samples = [Sample(ids.numpy().astype(np.int32), ids.numpy().astype(np.int32)) for ids in documents]
    batch = collate(samples)
    logits = models.head(model).logits(models.forward_hidden(model, batch))[0]
    cross_entropy(logits, batch.next_labels()).backward()


def padded_step(model: Any, documents: list[Tensor]) -> None:
    """Computes the loss of the documents as padded rows and its gradients."""
    ids = pad_sequence(documents, batch_first=True)
    real = pad_sequence([torch.ones_like(each) for each in documents], batch_first=True)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    labels = ids.masked_fill(real == 0, -100)[:, 1:]
    cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()).backward()


def make_sides(config: PretrainedConfig, folder: str) -> dict[str, Callable[[list[Tensor]], None]]:
    """Returns the step of each side; both have the same weights and adapters of the same sizes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    ours = models.load_model(ModelConfig(id=folder, dtype="float32"), NoBase())
    linears = {name.rpartition(".")[2] for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear)}
    names = sorted(linears - {"lm_head", "out_proj"})  # PEFT refuses Mamba's out_proj
    adapters.attach(ours, LoraAdapter(rank=8, target_modules=tuple(names)), seed=0)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = get_peft_model(theirs, LoraConfig(r=8, target_modules=names))
    theirs.train()
    ours.train()
    return {"packed": partial(packed_step, ours), "padded": partial(padded_step, theirs)}


def measure(config: PretrainedConfig, batches: list[list[Tensor]], turns: int) -> dict[str, float]:
    """Returns tokens per second: packed, padded, and padded in batches of similar lengths."""
    documents = sorted((each for batch in batches for each in batch), key=len)
    alike = [documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH)]
    num_tokens = sum(map(len, documents))
    seconds: dict[str, list[float]] = {"packed": [], "padded": [], "padded, by length": []}
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(config, folder)
        for turn in range(turns + 1):
            for name, taken in seconds.items():
                step = sides[name.partition(",")[0]]
                start = time.perf_counter()
                for batch in alike if "," in name else batches:
                    step(batch)
                if turn:  # the first warms up
                    taken.append(time.perf_counter() - start)
    return {name: num_tokens / statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    """Prints the rates of each hybrid, their ratios and the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a file in JSON Lines")
    parser.add_argument("--tokenizer", default="examples/models/ember-6m")
    parser.add_argument("--batches", type=int, default=4, help=f"batches of {_BATCH} texts")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a text at most")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["mamba2", "qwen3_next", "falcon_h1"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    documents = read_documents(options.texts, options.tokenizer, options.batches * _BATCH, options.longest)
    batches = [documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH)]
    lengths = [len(each) for each in documents]
    floor = sum(len(batch) * max(map(len, batch)) for batch in batches) / sum(lengths)
    print(f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}")
    print(f"floor: {floor:.2f} x, the places of a padded batch per token")
    found = shapes(options.width, options.layers, 1 + max(int(each.max()) for each in documents))
    for name in options.models:
        rates = measure(found[name], batches, options.turns)
        print(f"{name:<12} " + ", ".join(f"{side} {rate:.0f}" for side, rate in rates.items()) + " tokens/s")
        others = [(side, rates["packed"] / rate) for side, rate in rates.items() if side != "packed"]
        print("             " + ", ".join(f"{ratio:.2f} x {side}" for side, ratio in others))


if __name__ == "__main__":
    main()
