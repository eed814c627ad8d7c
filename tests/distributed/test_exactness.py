"""Several ranks take the steps of one process, for every kind, adapter, class of formats and kind of model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ingle import adapters, models
from ingle.config.adapter import LoraAdapter
from ingle.config.model import ModelConfig
from tests.conftest import make_tokenizer
from tests.contract.models.conftest import CONFIGS, randomized
from tests.contract.models.tiny_types import small_config, small_encoder_config
from tests.distributed.cases import Array, StepOfOneRank, take_all
from tests.distributed.ranks import run_ranks


class Case(NamedTuple):
    """A run, and the numbers of ranks and kinds that must give its results.

    Attributes:
        model: Its architecture in :data:`CONFIGS`, :data:`_DEALT` or :data:`_ENCODERS`.
        on: Kinds by number of ranks, with offload or without.
        options: Its further options.
        rounding: Largest relative difference. The delta rule normalizes short vectors, which magnifies rounding, and
            ranks group documents in another way.
    """

    model: str
    on: dict[int, tuple[str, ...]]
    options: Mapping[str, Any] = MappingProxyType({})
    rounding: float = 1e-5


_LORA = {"kind": "lora", "rank": 3}
_TRAINED = {"trainable_modules": ["embed_tokens", "norm"]}
_VIRTUAL = {"num_virtual_tokens": 3, "init": "random"}
_FULL = {"kind": "none"}
_MASKED = {"kind": "mlm", "rate": 0.6}
#: Together every adapter, class of formats, kind of model and layout meets every kind, and 2, 3 and 4 ranks.
CASES = {
    "lora": Case("llama", {1: ("none offload",), 2: ("ddp", "zero1", "zero2"), 3: ("zero3",), 4: ("hsdp offload",)}),
    "full": Case("qwen3", {2: ("zero2", "zero3"), 3: ("ddp",), 4: ("hsdp",)}, {"adapter": _FULL}),
    "full in bfloat16": Case("llama", {3: ("zero1", "zero3")}, {"adapter": _FULL, "model": {"dtype": "bfloat16"}}),
    "tied": Case("llama-tied", {2: ("zero3",), 3: ("zero1",)}, {"adapter": _FULL}),
    "nf4": Case("mistral", {2: ("zero2",), 3: ("zero3",)}, {"base": {"format": "nf4"}}),
    "int8, in bfloat16": Case("qwen2", {4: ("zero3",)}, {"base": {"format": "int8"}, "model": {"dtype": "bfloat16"}}),
    "ternary, dropout": Case(
        "gemma3", {3: ("hsdp", "ddp")}, {"base": {"format": "ternary"}, "adapter": _LORA | {"dropout": 0.3}}
    ),
    "blocks, recompute": Case("llama", {2: ("zero3",)}, {"base": {"format": "q4_0"}, "parallel": {"recompute": True}}),
    "magnitudes, a change subtracted": Case(
        "llama",
        {2: ("zero3",), 3: ("zero2",)},
        {"base": {"format": "nf4"}, "adapter": {"kind": "dora", "rank": 2, "init": "pissa"}},
    ),
    "virtual tokens": Case("llama", {2: ("zero3",), 3: ("ddp",)}, {"adapter": {"kind": "prompt"} | _VIRTUAL}),
    "added keys, nf4": Case(
        "mistral", {2: ("ddp",), 3: ("zero3",)}, {"base": {"format": "nf4"}, "adapter": {"kind": "prefix"} | _VIRTUAL}
    ),
    "directions of gradients": Case(
        "llama",
        {2: ("zero3",), 3: ("ddp",)},
        {"base": {"format": "nf4"}, "adapter": {"kind": "lora", "rank": 2, "init": "lora_ga"}},
        1e-4,
    ),
    "trained modules": Case(
        "gemma2",
        {2: ("zero1",), 3: ("zero3", "zero3 offload")},
        {"adapter": _LORA | _TRAINED, "model": {"dtype": "bfloat16"}},
    ),
    "from an adapter": Case(
        "llama", {2: ("zero3",), 3: ("zero1",)}, {"adapter": _LORA | _TRAINED | {"path": "adapter"}}
    ),
    "qa_lora": Case(
        "llama",
        {2: ("zero3",), 3: ("zero2",)},
        {"base": {"format": "q4_1"}, "adapter": {"kind": "qa_lora", "rank": 2, "train_rounding": True}},
    ),
    "merge-aware": Case(
        "qwen2", {3: ("zero3",)}, {"adapter": _LORA | {"merge_aware": {"format": "q8_0", "fraction": 1.0}}}
    ),
    "conv1d": Case("gpt2", {2: ("zero3",), 4: ("zero1",)}, {"base": {"format": "hqq"}}),
    "experts": Case("mixtral", {2: ("zero3",), 3: ("ddp",)}, {"base": {"format": "q8_0"}}),
    "experts, full": Case("deepseek_v3", {3: ("zero2", "zero3")}, {"adapter": _FULL}),
    "own attention": Case("falcon", {2: ("zero3",)}, {"data": {"packing": False}}),
    "task head": Case("llama", {2: ("zero3",), 3: ("ddp",)}, {"objective": {"kind": "classify"}}),
    "importance": Case("llama", {3: ("zero3",)}, {"train": {"imatrix": True}}),
    "states, recompute": Case("mamba2", {2: ("zero3",), 3: ("ddp",)}, {"parallel": {"recompute": True}}),
    "delta rule, nf4, recompute": Case(
        "qwen3_next", {2: ("zero1",), 3: ("zero3",)}, {"base": {"format": "nf4"}, "parallel": {"recompute": True}}, 5e-4
    ),
    "delta rule, full": Case("qwen3_next", {2: ("zero3",)}, {"adapter": _FULL}, 5e-4),
    "masked tokens": Case("bert", {2: ("zero1", "zero3"), 3: ("ddp",)}, {"objective": _MASKED, "adapter": _FULL}),
    "masked tokens, added bias": Case("esm", {3: ("zero3",)}, {"objective": _MASKED, "adapter": _FULL}),
    "slopes": Case("bloom", {2: ("ddp",), 4: ("hsdp offload",)}),
}
#: Models of which modules see documents as rows.
_DEALT = {name: partial(small_config, name) for name in ("bloom", "mamba2", "qwen3_next")}
_ENCODERS = {name: partial(small_encoder_config, name) for name in ("bert", "esm")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, StepOfOneRank]]]]:
    """The results of every rank, by number of ranks; the names of runs end with their kind."""
    folder = tmp_path_factory.mktemp("exactness")
    tokenizer = make_tokenizer()
    tokenizer.mask_token = "<|im_start|>"
    rows = [{"text": "the quick brown fox " * (1 + number % 4) + str(number)} for number in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"text": "hello world " * (1 + number) + "how are you"} for number in range(5)]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    for name in ("labelled", "labelled-held-out"):
        labelled = [row | {"label": "even" if number % 2 else "odd"} for number, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    for name in {case.model for case in CASES.values()}:
        config = (CONFIGS | _DEALT | _ENCODERS)[name]()
        config.vocab_size = len(tokenizer) + 1 + len(tokenizer) % 2  # odd
        config.max_position_embeddings = 256
        if getattr(config, "sliding_window", None):
            config.sliding_window = 12  # shorter than the documents
        randomized(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write_adapter(folder / "adapter", folder / "llama")
    found = {}
    for world_size in (1, 2, 3, 4):
        configs = {
            f"{name}: {kind}": _config(folder, case, kind, world_size)
            for name, case in CASES.items()
            for kind in (*(("none",) if world_size == 1 else ()), *case.on.get(world_size, ()))
        }
        found[world_size] = run_ranks(world_size, take_all, configs, timeout_s=300)
    yield found


def _write_adapter(folder: Path, model: Path) -> None:
    """Writes an adapter of which nothing is zero."""
    config = LoraAdapter.model_validate(_LORA | _TRAINED)
    loaded = models.load_model(ModelConfig(id=str(model), dtype="float32"))
    adapters.attach(loaded, config, seed=1)
    for _, parameter in adapters.trainable_parameters(loaded):
        torch.nn.init.normal_(parameter, std=0.1)
    adapters.save_adapter(loaded, folder, config, str(model))


def _config(folder: Path, case: Case, kind: str, world_size: int) -> dict[str, Any]:
    is_labelled = case.options.get("objective") == {"kind": "classify"}
    files = ("labelled", "labelled-held-out") if is_labelled else ("data", "held-out")
    config: dict[str, Any] = {
        "model": {"id": str(folder / case.model), "dtype": "float32"},
        "adapter": _LORA,
        "data": {
            "sources": [{"path": str(folder / f"{files[0]}.jsonl")}],
            "validation": str(folder / f"{files[1]}.jsonl"),
            "max_seq_len": 40,
            "packing": True,
        },
        "objective": {"kind": "clm"},
        "train": {"global_batch_size": 3, "micro_batch_size": 1, "num_steps": 3, "compile": False},
        "parallel": {
            "kind": kind.split()[0],
            "offload": "offload" in kind,
            "device": "cpu",
            "num_threads": 1,
        },
        "output": str(folder / "run"),
    }
    if kind.startswith("hsdp"):
        config["parallel"]["shard_size"] = 2 if world_size == 4 else 1
    for section, options in case.options.items():
        options = dict(options)
        if "path" in options:
            options["path"] = str(folder / options["path"])
        config[section] = options if section == "adapter" else config.get(section, {}) | options
    return config


@pytest.mark.parametrize(
    ("name", "kind", "world_size"),
    [(name, kind, size) for name, case in CASES.items() for size, kinds in case.on.items() for kind in kinds],
)
def test_ranks_take_the_steps_of_one_process(
    results: dict[int, list[dict[str, StepOfOneRank]]], name: str, kind: str, world_size: int
) -> None:
    (alone,) = results[1]
    expected = alone[f"{name}: none"]
    for each in results[world_size]:
        found = each[f"{name}: {kind}"]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.norm == pytest.approx(expected.norm, rel=CASES[name].rounding)
        assert found.num_fused == expected.num_fused
        assert found.sha256 == expected.sha256
        largest = max(abs(gradient).max() for gradient in expected.gradients.values())
        _require_equal(found.gradients, expected.gradients, CASES[name].rounding, 1e-7 * largest)
        _require_equal(found.importance, expected.importance, 1e-6)


@pytest.mark.parametrize(
    ("name", "world_size"), [(name, size) for name, case in CASES.items() for size in case.on if size > 1]
)
def test_ranks_agree_on_the_validation_of_one_process(
    results: dict[int, list[dict[str, StepOfOneRank]]], name: str, world_size: int
) -> None:
    """To the last bit among themselves, so that all of them keep the same step; some have no document."""
    expected = results[1][0][f"{name}: none"].held_out
    assert expected[:, 1].sum() > 20
    for kind in CASES[name].on[world_size]:
        first, *others = (each[f"{name}: {kind}"].held_out for each in results[world_size])
        tolerance = 1e-2 if CASES[name].options.get("model") else 1e-4  # one step of bfloat16 weights lies between
        np.testing.assert_allclose(first, expected, rtol=tolerance)
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.options.get("adapter") != _FULL])
def test_the_frozen_base_exists_once_or_on_every_rank(
    results: dict[int, list[dict[str, StepOfOneRank]]], name: str
) -> None:
    alone = results[1][0][f"{name}: none"].base_bytes
    for world_size, kinds in CASES[name].on.items():
        for kind in kinds:
            found = [each[f"{name}: {kind}"].base_bytes for each in results[world_size]]
            shards = {"zero3": world_size, "hsdp": 2 if world_size == 4 else 1}.get(kind.split()[0], 1)
            assert sum(found) == alone * world_size // shards
            assert max(found) < 1.2 * alone / shards


def _require_equal(
    found: dict[str, Array], expected: dict[str, Array], tolerance: float, rounding: float = 0.0
) -> None:
    """Compares arrays; ``rounding`` is the largest difference of those that are zero in exact arithmetic."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        floor = max(tolerance * abs(value).max(), rounding)
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=floor, err_msg=name)
