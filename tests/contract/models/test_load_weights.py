"""Loading into a model on the meta device: adapted modules are filled, and a rank can load its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ingle import models
from ingle.adapters.lora import LoraLinear
from ingle.config.base import BaseConfig, base_section
from ingle.config.model import ModelConfig
from ingle.gguf import GgufTensor
from ingle.models.loading.safetensors_files import StoredTensor
from ingle.quant import QuantLinear

EMBER = Path(__file__).parents[3] / "examples/models/ember-6m"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read from a model's files."""
    found: list[int] = []
    read_tensor, read_gguf = StoredTensor.read_into, GgufTensor.read
    monkeypatch.setattr(
        StoredTensor, "read_into", lambda self, out: found.append(self.num_bytes) or read_tensor(self, out)
    )
    monkeypatch.setattr(GgufTensor, "read", lambda self: found.append(self.num_bytes) or read_gguf(self))
    return found


def load(config: ModelConfig, base: BaseConfig, rows: Callable[[str, int, int], range] | None = None):
    model = models.meta_model(config, "cpu", torch.float32)
    models.convert_base(model, config, base)
    models.load_weights(model, config, "cpu", torch.float32, rows=rows)
    return model


def select(rank: int) -> Callable[[str, int, int], range]:
    def half(name: str, num_rows: int, row_group: int) -> range:
        middle = num_rows // 2 // row_group * row_group
        return range(middle) if rank == 0 else range(middle, num_rows)

    return half


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def require_halves(config: ModelConfig, base: BaseConfig, reads: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Loads all rows, then both halves; compares them and returns what each load has read."""
    found: list[list[int]] = []
    loaded = []
    for rows in (None, select(0), select(1)):
        loaded.append(dict(tensors(load(config, base, rows))))
        found.append(reads.copy())
        reads.clear()
    full, first, second = loaded
    assert full.keys() == first.keys() == second.keys()
    for name, expected in full.items():
        if len(first[name]) == len(expected):  # one value for the matrix
            assert len(expected) == 1 and torch.equal(first[name], expected) and torch.equal(second[name], expected)
        else:
            assert torch.equal(torch.cat([first[name], second[name]]), expected), name
            assert 0.4 < len(first[name]) / len(expected) < 0.6 or len(expected) < 20, name
    return found[0], found[1], found[2]


@pytest.mark.parametrize(
    "base",
    ["none", {"format": "nf4", "double_quant": False}, "int8", "q4_k", {"format": "hqq", "bits": 3}],
    ids=str,
)
def test_two_halves_are_the_full_load_and_read_every_byte_once(base: str | dict[str, object], reads: list[int]) -> None:
    config = ModelConfig(id=str(EMBER), dtype="float32")
    full, first, second = require_halves(config, base_section(base), reads)
    assert sum(first) + sum(second) == sum(full)
    assert max(first) == max(second) == max(full) / 2


@pytest.mark.parametrize("type_name", ["f32", "q8_0", "q4_k_m"])
def test_halves_of_a_gguf_file_read_every_byte_once(tmp_path: Path, gguf_of, type_name: str, reads: list[int]) -> None:
    config = ModelConfig(id=str(gguf_of(EMBER, tmp_path / "ember.gguf", type_name)), dtype="float32")
    reads.clear()
    full, first, second = require_halves(config, base_section("none"), reads)
    assert sum(first) + sum(second) == sum(full)
    assert max(first) == max(second) == max(full) / 2


@pytest.mark.parametrize("base", ["none", {"format": "nf4", "double_quant": False}], ids=str)
def test_stacked_experts_are_halved_by_expert(make_checkpoint, base, reads: list[int]) -> None:
    full, first, second = require_halves(make_checkpoint("qwen3_moe").config, base_section(base), reads)
    assert sum(first) + sum(second) == sum(full) and sum(first) < 0.6 * sum(full)


def test_weights_that_are_encoded_as_one_are_cut_afterwards(make_checkpoint, reads: list[int]) -> None:
    require_halves(ModelConfig(id=str(EMBER), dtype="float32"), base_section("nf4"), reads)
    require_halves(make_checkpoint("llama").config, base_section({"format": "ternary", "group_size": "tensor"}), reads)
    require_halves(make_checkpoint("gpt2").config, base_section("int8"), reads)


def test_what_an_adapter_adds_gets_memory_and_is_not_missing(make_checkpoint) -> None:
    config, base = make_checkpoint("llama").config, base_section("int8")
    model = models.meta_model(config, "cpu", torch.float32)
    models.convert_base(model, config, base)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            layer = LoraLinear(module, rank=2, scale=1.0)
            for key in ("lora_a", "lora_b"):
                setattr(layer, key, nn.Parameter(getattr(layer, key).to("meta")))
            layer.register_buffer("before", torch.empty(3, device="meta"), persistent=False)
            model.set_submodule(name, layer)
    model.model.norm.requires_grad_(True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    models.load_weights(model, config, "cpu", torch.float32)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    expected = {name: value for name, value in tensors(models.load_model(config, base))}
    found = {name.replace(".base.", "."): value for name, value in tensors(model) if "lora" not in name}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
