"""Speed of sampled answers: by the sampler with slots, by ``generate()``, and by transformers, in one run.

    python -m benchmarks.rollouts --threads 2

All sides answer the same prompts of the demo task at temperature 1, several times each, and take turns; the median
counts. Their random numbers differ, so their answers have the same lengths only on average; rates are of their own
tokens. Ingle's sides run the base with LoRA adapters, transformers runs the base alone. The floor is the time of the
products of the token steps alone, with every slot in use and nothing else computed: its bytes are those of the weights
and of the stored keys and values that a step reads, its operations those of the products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.timing import take_turns
from ingle import adapters, data, models
from ingle.config import LoraAdapter, ModelConfig, Nf4Base, NoBase
from ingle.data.types import Example, Message
from ingle.models import Request, Sampling

DEMO = Path("examples/demo/train.jsonl")


def read_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Returns the first prompts of the demo task."""
    rows = [json.loads(line) for line in DEMO.read_text().splitlines()[:count]]
    asked = [(Message("user", row["messages"][0]["content"]), Message("assistant", "")) for row in rows]
    return [list(data.prompt_ids(tokenizer, Example(origin="benchmark", messages=each))) for each in asked]


def make_model(options: argparse.Namespace) -> Any:
    """Returns the base with adapters that change nothing yet, fused."""
    base = Nf4Base(format="nf4") if options.format == "nf4" else NoBase()
    model = models.load_model(ModelConfig(id=options.model, dtype=options.dtype), base)
    adapters.attach(model, LoraAdapter(rank=16), seed=0)
    adapters.fuse(model)
    return model


def sides(
    model: Any, plain: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, Callable[[], int]]:
    """Returns what samples all answers, by name; each returns the number of tokens."""
    requests = [
        Request(number, answer, prompt, options.max_new_tokens)
        for number, prompt in enumerate(prompts)
        for answer in range(options.answers)
    ]
    repeated = sorted((list(request.prompt) for request in requests), key=len)
    sampler = models.make_sampler(model, tokenizer, Sampling(num_slots=options.slots, prefill_tokens=options.prefill))
    print(f"invariant: {sampler.is_invariant}; {sampler.note or 'no note'}", flush=True)

    def by_slots() -> int:
        return sum(len(rollout.ids) for rollout in sampler.run(requests, stop=lambda: False))

    def by_generate() -> int:
        size = {"max_new_tokens": options.max_new_tokens, "batch_size": options.slots}
        answers = models.generate(model, tokenizer, repeated, temperature=1.0, **size)
        return sum(len(answer.token_ids) + (answer.finish_reason == "stop") for answer in answers)

    ends = sorted(models.end_token_ids(model, tokenizer))

    def by_transformers() -> int:
        total = 0
        for start in range(0, len(repeated), options.slots):
            batch = repeated[start : start + options.slots]
            width = max(map(len, batch))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(each)) + each for each in batch])
            mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in batch])
            size: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
            size["eos_token_id"] = ends
            whole = plain.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, **size)
            is_end = torch.isin(whole[:, width:], torch.tensor(ends))
            total += int((is_end.cumsum(1) - is_end.int() == 0).sum())
        return total

    return {"slots": by_slots, "generate()": by_generate, "transformers": by_transformers}


def products(plain: Any, num_slots: int) -> tuple[Callable[[], None], int, int]:
    """Returns the products of a token step, their floating-point operations, and the bytes of their weights."""
    weights = [module.weight.detach() for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    inputs: dict[int, Tensor] = {w.shape[1]: torch.randn(num_slots, w.shape[1], dtype=w.dtype) for w in weights}

    def step() -> None:
        with torch.no_grad():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    count = sum(weight.numel() for weight in weights)
    return step, 2 * num_slots * count, count * weights[0].element_size()


def key_bytes(plain: Any, prompts: list[list[int]], mean_tokens: float, num_slots: int) -> int:
    """Returns the bytes of keys and values that a token step reads, on average."""
    config = plain.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * plain.dtype.itemsize
    return int(num_slots * row * (statistics.mean(map(len, prompts)) + mean_tokens / 2))


def main() -> None:
    """Prints the rates of all sides and the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/ember-6m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--format", choices=("none", "nf4"), default="none")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--answers", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--slots", type=int, default=64, help="answers that grow together; the batch of other sides")
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for a busy machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options)
    tokenizer = models.load_tokenizer(ModelConfig(id=options.model))
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=model.dtype).eval()
    prompts = read_prompts(tokenizer, options.prompts)
    tokens: dict[str, int] = {}
    clock = time.process_time if options.processor_time else time.perf_counter

    def counted(name: str, work: Callable[[], int]) -> Callable[[], None]:
        return lambda: tokens.update({name: work()})

    works = {name: counted(name, work) for name, work in sides(model, plain, tokenizer, prompts, options).items()}
    step, operations, weight_bytes = products(plain, options.slots)
    seconds = take_turns(works, options.turns, clock=clock)
    step_s = statistics.median(take_turns({"products": step}, 50, clock=clock)["products"])
    count, records = options.prompts * options.answers, []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        found = {
            "side": name,
            "seconds": median,
            "rollouts_per_s": count / median,
            "tokens_per_s": tokens[name] / median,
        }
        records.append(found | {"mean_tokens": tokens[name] / count})
        print(
            f"{name:13} {count / median:8.1f} rollouts/s {tokens[name] / median:9.0f} tokens/s "
            f"({tokens[name] / count:.1f} tokens each, {median:.2f} s)",
            flush=True,
        )
    read = weight_bytes + key_bytes(plain, prompts, tokens["slots"] / count, options.slots)
    rate = options.slots / step_s
    print(
        f"{'floor':13} {rate / tokens['slots'] * count:8.1f} rollouts/s {rate:9.0f} tokens/s "
        f"({operations / 1e9:.2f} GFLOP and {read / 1e6:.1f} MB in {step_s * 1e3:.1f} ms a token step)"
    )
    records.append({"side": "floor", "step_s": step_s, "operations": operations, "bytes": read})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
