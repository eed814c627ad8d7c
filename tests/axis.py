"""One small run for each objective and each layout: what a property of training must hold for, whatever is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from ingle.assembly import Assembled
from ingle.data.batch import Batch
from ingle.models.loading.layout_choice import enliven
from ingle.training.steps import prepare
from tests import tiny_tokenizers
from tests.conftest import make_tokenizer
from tests.contract.models.tiny_types import small_config, small_encoder_config, small_encoder_decoder_config

Options = Mapping[str, Any]


class Point(NamedTuple):
    """An objective over a model.

    Attributes:
        model: Its model type.
        layout: How documents go through it.
        objective: The section of the config.
        options: Further sections.
    """

    model: str
    layout: str
    objective: Options
    options: Options = MappingProxyType({})


class _Kind(NamedTuple):
    """How models of one kind are made."""

    auto: Any
    config: Callable[[str], PretrainedConfig]
    tokenizer: Callable[[], PreTrainedTokenizerFast]


def _with_sentinels() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizers.t5()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{number}>" for number in range(16)]})
    return tokenizer


_CAUSAL = _Kind(transformers.AutoModelForCausalLM, small_config, make_tokenizer)
_ENCODER = _Kind(transformers.AutoModelForMaskedLM, small_encoder_config, tiny_tokenizers.bert)
_PAIRS = _Kind(transformers.AutoModelForSeq2SeqLM, small_encoder_decoder_config, _with_sentinels)
_BART = _PAIRS._replace(tokenizer=tiny_tokenizers.roberta)
_KINDS = {
    **dict.fromkeys(("llama", "bloom", "mamba2"), _CAUSAL),
    **dict.fromkeys(("bert", "modernbert", "esm", "deberta-v2", "squeezebert", "funnel", "fnet"), _ENCODER),
    **dict.fromkeys(("t5", "longt5"), _PAIRS),
    **dict.fromkeys(("bart", "led"), _BART),
}
_FULL: Options = {"adapter": {"kind": "none"}}
_NF4: Options = {"base": {"format": "nf4"}}
_OFT: Options = {"kind": "peft", "options": {"oft_block_size": 4}}
_ADALORA: Options = {"kind": "peft", "method": "adalora", "options": {"init_r": 4, "target_r": 1, "tfinal": 1}}


def _rule(kind: str, **options: Any) -> Options:
    return {"optim": {"rule": {"kind": kind, **options}}}


#: A row of each step for each of two answers to four prompts.
_ANSWERS: Options = {"train": {"global_batch_size": 8}}
_SAMPLED: Options = {
    "rewards": ["reward.py"],
    "num_prompts": 4,
    "num_generations": 2,
    "unfinished": "score",
    "rollout": {"max_new_tokens": 6},
}
#: Different for nearly all answers.
_REWARD = "def reward(prompt, completion, **columns):\n    return sum(map(ord, completion)) % 7\n"

#: Every objective, and every layout of every kind of model.
POINTS = {
    "clm, packed": Point("llama", "packed", {"kind": "clm"}, {"data": {"packing": False}}),
    "clm, dealt states": Point("mamba2", "documents", {"kind": "clm"}),
    "sft, dealt attention": Point("bloom", "documents", {"kind": "sft"}, _NF4),
    "sft, packed, dora": Point(
        "llama", "packed", {"kind": "sft"}, {"adapter": {"kind": "dora", "rank": 2, "init": "pissa"}}
    ),
    "sft, packed, bottleneck": Point(
        "llama", "packed", {"kind": "sft"}, {"adapter": {"kind": "bottleneck", "size": 3, "style": "parallel"}, **_NF4}
    ),
    "seq2seq, packed, ia3": Point("t5", "packed", {"kind": "seq2seq"}, {"adapter": {"kind": "ia3"}, **_NF4}),
    "classify, packed, biases": Point(
        "bert", "packed", {"kind": "classify"}, {"adapter": {"kind": "bitfit", "norms": True}, **_NF4}
    ),
    "dpo, packed, oft": Point("llama", "packed", {"kind": "dpo"}, {"adapter": {**_OFT, "method": "oft"}, **_NF4}),
    "sft, packed, adalora": Point("llama", "packed", {"kind": "sft"}, {"adapter": _ADALORA}),
    "clm, galore, full": Point("llama", "packed", {"kind": "clm"}, _FULL | _rule("galore", rank=4, update_every=3)),
    "clm, apollo, full": Point("llama", "packed", {"kind": "clm"}, _FULL | _rule("apollo", rank=4, update_every=3)),
    "clm, lisa, full": Point("llama", "packed", {"kind": "clm"}, _FULL | _rule("lisa", active=1, every=3)),
    "sft, subspace": Point("llama", "packed", {"kind": "sft"}, _rule("subspace", dim=8, gains=True)),
    "dpo, packed, prefix": Point(
        "llama", "packed", {"kind": "dpo"}, {"adapter": {"kind": "prefix", "num_virtual_tokens": 3}}
    ),
    "tag, dealt, prompt": Point(
        "deberta-v2",
        "documents",
        {"kind": "tag", "stride": 4},
        {"adapter": {"kind": "prompt", "num_virtual_tokens": 3}},
    ),
    "span, packed, prompt": Point(
        "t5",
        "packed",
        {"kind": "span", "density": 0.3},
        _NF4 | {"adapter": {"kind": "prompt", "num_virtual_tokens": 3, "encoder": "lstm", "init": "random"}},
    ),
    "mlm, packed": Point("modernbert", "packed", {"kind": "mlm", "rate": 0.4}, _NF4),
    "mlm, dealt, full": Point("esm", "documents", {"kind": "mlm", "rate": 0.4}, _FULL),
    "mlm, equal rows": Point("funnel", "equal_rows", {"kind": "mlm", "rate": 0.4}),
    "span, packed": Point("t5", "packed", {"kind": "span", "density": 0.3}, _NF4),
    "span, rows": Point("led", "rows", {"kind": "span", "style": "bart"}),
    "seq2seq, packed, full": Point("bart", "documents", {"kind": "seq2seq"}, _FULL),
    "seq2seq, rows": Point("longt5", "rows", {"kind": "seq2seq"}),
    "classify, packed, full": Point("bert", "packed", {"kind": "classify"}, _FULL),
    "classify, dealt": Point("bloom", "documents", {"kind": "classify", "class_weights": "balanced"}),
    "classify, pairs": Point("t5", "rows", {"kind": "classify"}),
    "tag, dealt": Point("deberta-v2", "documents", {"kind": "tag", "stride": 4}, _NF4),
    "tag, rows": Point("squeezebert", "rows", {"kind": "tag", "stride": 4}, _FULL),
    "answer, packed": Point("bert", "packed", {"kind": "answer", "stride": 4}),
    "answer, equal rows": Point("fnet", "equal_rows", {"kind": "answer", "stride": 4}),
    "dpo, packed": Point("llama", "packed", {"kind": "dpo", "sft_weight": 0.2}),
    "kto, dealt states": Point("mamba2", "documents", {"kind": "kto"}),
    "simpo, pairs, full": Point("bart", "documents", {"kind": "simpo"}, _FULL),
    "grpo, packed": Point("llama", "packed", {"kind": "grpo", **_SAMPLED, "num_passes": 2}, _ANSWERS),
    "rloo, dealt states": Point("mamba2", "documents", {"kind": "rloo", **_SAMPLED}, _ANSWERS),
    "ppo, dealt attention": Point("bloom", "documents", {"kind": "ppo", **_SAMPLED, "num_passes": 2}, _ANSWERS),
    "raft, packed": Point("llama", "packed", {"kind": "raft", **_SAMPLED}),
    "online_dpo, packed": Point("llama", "packed", {"kind": "online_dpo", **_SAMPLED}),
    "reward, dealt attention": Point("bloom", "documents", {"kind": "reward", "centering": 0.1}),
}

_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "in", "New", "York"]


def _text(number: int) -> str:
    return " ".join(_WORDS[(number + place) % 11] for place in range(3 + number * 5 % 9))


def _answer(number: int) -> dict[str, Any]:
    context = _text(number)
    word = context.split()[number % 3]
    return {
        "question": f"was it {_WORDS[number % 5]}?",
        "context": context,
        "answers": {"text": [word], "answer_start": [context.index(word)]},
    }


def _tagged(number: int) -> dict[str, Any]:
    tokens = _text(number).split()
    return {"tokens": tokens, "tags": ["B-X" if len(token) > 4 else "O" for token in tokens]}


def _preference(number: int) -> dict[str, Any]:
    return {"prompt": _text(number), "chosen": _text(number * 7 + 3), "rejected": _text(number * 5 + 1) + " fox"}


#: A row of each objective, by its number.
_ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    **dict.fromkeys(("clm", "mlm", "span"), lambda number: {"text": _text(number)}),
    **dict.fromkeys(("sft", "seq2seq"), lambda number: {"prompt": _text(number), "completion": _text(number * 7 + 3)}),
    "classify": lambda number: {"text": _text(number), "label": "even" if number % 3 else "odd"},
    "tag": _tagged,
    "answer": _answer,
    **dict.fromkeys(("dpo", "kto", "simpo", "reward"), _preference),
    **dict.fromkeys(("grpo", "rloo", "ppo", "raft", "online_dpo"), lambda number: {"prompt": _text(number)}),
}


class Plenty:
    """Memory for every step: nothing is split."""

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        return list(batches)

    def relieve(self, reason: str, batches: Sequence[Batch]) -> None:
        raise AssertionError(reason)

    def attempt(self, compute: Callable[[list[Batch]], Any], batches: Sequence[Batch]) -> Any:
        return compute(list(batches))


def next_batches(parts: Assembled, step: int) -> Sequence[Batch]:
    """Returns the batches of a step, after answers were sampled if it needs new ones."""
    with torch.no_grad():
        assert parts.objective.collect(step, Plenty(), lambda event: None)
    return prepare(parts.objective, parts.objective.next_batches())


def write_model(folder: Path, model: str) -> None:
    """Writes a small model of a type with large random weights, and its tokenizer."""
    kind = _KINDS[model]
    tokenizer = kind.tokenizer()
    config = kind.config(model)
    config.vocab_size = len(tokenizer) + 1 + len(tokenizer) % 2  # odd
    torch.manual_seed(0)
    built = kind.auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        enliven(built)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(folder: Path, point: Point) -> dict[str, Any]:
    """Returns the config of a run of some steps on one process; writes its model and data if they are missing."""
    model, rows = folder / point.model, folder / f"{point.objective['kind']}.jsonl"
    if not model.exists():
        write_model(model, point.model)
    if not rows.exists():
        make = _ROWS[point.objective["kind"]]
        rows.write_text("".join(json.dumps(make(number)) + "\n" for number in range(30)))
    config: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"sources": [{"path": str(rows)}], "validation": 0.2, "max_seq_len": 32, "packing": True},
        "objective": dict(point.objective),
        "optim": {"lr": 1e-2},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "num_steps": 4, "save_every": 2, "compile": False},
        "parallel": {"kind": "none", "device": "cpu", "num_threads": 1},
        "output": str(folder / "run"),
    }
    if "rewards" in point.objective:
        (folder / "reward.py").write_text(_REWARD)
        config["objective"]["rewards"] = [{"kind": "function", "path": str(folder / "reward.py")}]
    for section, options in point.options.items():
        config[section] = dict(options) if section == "adapter" else config.get(section, {}) | options
    return config
