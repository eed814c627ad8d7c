"""Pairs of options: each trains two steps and opens again to the same answers, or is refused with a remedy.

The test knows no rule about which options go together.  It knows that a refusal comes before anything is written and
says what to do, and that every adapter, and every format but those that Ingle only reads, trains in some combination.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ingle import adapters, flow, inference
from ingle.config import load_run
from ingle.config.base import FormatName
from ingle.errors import IngleError
from ingle.events import Event, Step
from tests.conftest import make_tokenizer

#: Formats of downloaded files, in which Ingle stores no weight.
ONLY_READ = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "mxfp4", "nvfp4"}

#: Flags by axis and value.
AXES: Mapping[str, Mapping[str, list[str]]] = {
    "format": {name: [f"--base.format={name}"] for name in get_args(FormatName)},
    "adapter": {
        "none": ["--adapter.kind=none"],
        "lora": ["--adapter.rank=2"],
        "dora": ["--adapter.kind=dora", "--adapter.rank=2", "--adapter.init=pissa"],
        "merge-aware": ["--adapter.rank=2", "--adapter.merge_aware.fraction=0.5"],
        "qa_lora": ["--adapter.kind=qa_lora", "--adapter.rank=2"],
        "qa_lora-rounded": ["--adapter.kind=qa_lora", "--adapter.rank=2", "--adapter.train_rounding"],
    },
    "objective": {"sft": ["--objective.kind=sft"], "clm": ["--objective.kind=clm"]},
    "recompute": {"off": [], "on": ["--parallel.recompute=true"]},
    "packing": {"on": [], "off": ["--data.packing=false", "--train.micro_batch_size=1"]},
}
#: Adapters that do not look at the format: tried over two.
OTHERS: Mapping[str, list[str]] = {
    "bottleneck": ["--adapter.kind=bottleneck", "--adapter.style=parallel"],
    "ia3": ["--adapter.kind=ia3"],
    "norms": ["--adapter.kind=bitfit", "--adapter.biases=false", "--adapter.norms"],
    "oft": ["--adapter.kind=peft", "--adapter.method=oft", "--adapter.options.oft_block_size=16"],
}
Combination = tuple[str, ...]


def pairwise(axes: Mapping[str, Mapping[str, Any]]) -> Iterator[Combination]:
    """Combinations that together hold every pair of values of two axes; greedy, so nearly as few as there can be."""
    places = list(combinations(range(len(axes)), 2))
    everything = list(product(*axes.values()))
    missing = {(i, j, each[i], each[j]) for each in everything for i, j in places}

    def new(each: Combination) -> int:
        return sum((i, j, each[i], each[j]) in missing for i, j in places)

    while missing:
        best = max(everything, key=new)
        missing -= {(i, j, best[i], best[j]) for i, j in places}
        yield best


_SWEEP = pytest.mark.sweep
COMBINATIONS = list(pairwise(AXES))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks in every format, and something to learn."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    turns = [("user", "hello world?"), ("assistant", "the quick brown fox jumps")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clm.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 4)
    return folder


def trains(material: Path, output: Path, combination: Combination) -> bool:
    """Whether a combination trains; false where it is refused as it should be."""
    chosen = dict(zip(AXES, combination, strict=True))
    flags = [
        *(flag for axis, value in chosen.items() for flag in {**AXES[axis], **OTHERS}[value]),
        f"--model.id={material}/model",
        "--model.dtype=float32",
        f"--data.sources={material}/{chosen['objective']}.jsonl",
        "--data.max_seq_len=64",
        "--train.num_steps=2",
        "--train.global_batch_size=2",
        "--train.save_every=0",
        "--optim.lr=1e-2",
        "--optim.warmup_steps=0",
        f"--output={output}",
    ]
    losses = []

    def sink(event: Event) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    try:
        flow.finetune(load_run(None, flags).run, sink)
    except IngleError as refusal:
        assert " fix " in str(refusal), f"{combination}: a refusal says what to do"
        assert not losses and not output.exists(), f"{combination}: a refusal comes before anything is written"
        return False
    assert len(losses) == 2 and 0 < losses[1] < 20, combination
    engine: Any = inference.open_model(str(output))
    with torch.no_grad():
        assert bool(engine.model(torch.arange(8)[None]).logits.isfinite().all()), combination
    is_native = chosen["adapter"] in ("none", "norms")
    assert bool(adapters.adapted_modules(engine.model)) != is_native, combination
    layers = adapters.lora_modules(engine.model)
    assert all(bool(layer.lora_b.any()) for layer in layers.values()), f"{combination}: an adapter has not moved"
    return True


@pytest.mark.parametrize("format", AXES["format"])
def test_a_format_trains_or_is_refused(material: Path, tmp_path: Path, format: str) -> None:
    combinations = [each for each in COMBINATIONS if each[0] == format]
    assert len(combinations) >= len(AXES["adapter"])
    trained = [each for each in combinations if trains(material, tmp_path / "-".join(each), each)]
    assert bool(trained) == (format not in ONLY_READ)


@pytest.mark.parametrize("adapter", [*AXES["adapter"], *(pytest.param(name, marks=_SWEEP) for name in OTHERS)])
def test_an_adapter_trains_over_some_format(material: Path, tmp_path: Path, adapter: str) -> None:
    tried = ((format, adapter, "sft", "off", "on") for format in ("q5_1", "none"))
    assert any(trains(material, tmp_path / each[0], each) for each in tried)
