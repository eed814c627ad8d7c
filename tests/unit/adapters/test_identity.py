"""An adapter records the base it was trained on: another base is refused, or its distance is reported."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ingle import adapters
from ingle.adapters import identify
from ingle.adapters import identity as identity_module
from ingle.adapters.identity import TensorHasher, make_identity, tensor_digest
from ingle.config.adapter import LoraAdapter, MergeAware, QaLoraAdapter
from ingle.config.base import base_section
from ingle.errors import AdapterError
from ingle.quant import convert
from tests.tiny import SIZES

ADAPTER = LoraAdapter(rank=2, target_modules=("q_proj", "up_proj"))
IDS = torch.arange(12)[None]


def llama(base: str = "none", dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).bfloat16().to(dtype)
    convert(model, base_section(base))
    return model.eval()


def prepared(base: str = "none", adapter: Any = ADAPTER, **options: Any) -> Any:
    model = llama(base, **options)
    adapters.attach(model, adapter, seed=0)
    return model


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05


def saved(folder: Path, base: str = "nf4", adapter: Any = ADAPTER) -> Any:
    """A model whose adapter is in a folder, bound to its base."""
    model = prepared(base, adapter)
    identity = identify(model)
    move(model)
    adapters.save_adapter(model, folder, adapter, "some/base", base=base_section(base), identity=identity)
    return model


def test_the_digest_covers_shape_type_and_values() -> None:
    codes = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert tensor_digest(codes) == hashlib.sha256(b"[2, 3] torch.uint8\n" + bytes(range(6))).hexdigest()
    values = torch.tensor([1.0, -2.5])
    assert tensor_digest(values) == hashlib.sha256(b"[2] torch.bfloat16\n\x80\x3f\x20\xc0").hexdigest()
    assert tensor_digest(codes) != tensor_digest(codes.view(3, 2))
    identities = [make_identity(d, {}, {}).sha256 for d in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "2"})]
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 2), (9,), (), (0, 4)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 100])
def test_the_digest_of_row_chunks_is_that_of_the_tensor(
    shape: tuple[int, ...], num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(shape)
    content = tensor.bfloat16().flatten().view(torch.uint8).numpy().tobytes()
    wanted = hashlib.sha256(f"{list(shape)} torch.bfloat16\n".encode() + content).hexdigest()
    hasher = TensorHasher(shape, torch.float32)
    for rows in tensor.split(num_rows) if shape else [tensor]:
        hasher.update(rows)
    assert hasher.hexdigest() == wanted
    monkeypatch.setattr(identity_module, "_CHUNK_ELEMENTS", num_rows)
    assert tensor_digest(tensor) == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_is_the_same_however_it_is_held_and_trained(tied: bool) -> None:
    saved_module = LoraAdapter(rank=3, trainable_modules=("embed_tokens",))
    model = prepared(tied=tied)
    identity = identify(model)
    move(model)
    adapters.fuse(model)
    assert identify(model) == identity  # trained, fused
    assert identify(prepared(dtype=torch.float32, tied=tied)).sha256 == identity.sha256
    other = prepared(adapter=saved_module, tied=tied)
    assert identify(other).sha256 == identity.sha256
    move(other)
    assert identify(other).sha256 == identity.sha256  # modules_to_save count with their weights from before training


@pytest.mark.parametrize("base", ["none", "nf4", "q4_0"])
def test_one_bit_makes_another_base(base: str) -> None:
    model = prepared(base)
    before = identify(model)
    for name, parameter in list(model.named_parameters()):
        if "lora" in name:
            continue
        raw = parameter.detach().view(torch.uint8).flatten()
        raw[-1] ^= 1
        after = identify(model)
        raw[-1] ^= 1
        assert after.sha256 != before.sha256, name
        assert [key for key in before.tensors if after.tensors[key] != before.tensors[key]] == [
            name.replace(".base", "")
        ]
    assert identify(model) == before


def test_formats_are_counted() -> None:
    assert identify(prepared("q5_1")).formats == {"q5_1": 14}
    assert identify(prepared()).formats == {}


def test_an_adapter_is_refused_on_another_base(tmp_path: Path) -> None:
    model = saved(tmp_path)
    again = llama("nf4")
    adapters.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for other in (llama("q4_0"), llama("nf4", seed=1), llama()):
        with pytest.raises(AdapterError, match="trained on another base"):
            adapters.load_adapter(other, tmp_path)


def test_the_distance_of_another_base_is_reported(tmp_path: Path) -> None:
    saved(tmp_path)
    other = llama("q4_0")
    (note,) = adapters.load_adapter(other, tmp_path, allow_mismatch=True).notes
    layers = {name: layer.base for name, layer in adapters.lora_modules(other).items()}
    theirs = {name: llama("nf4").get_submodule(name) for name in layers}
    pairs = [(layers[n].decode(torch.float32), theirs[n].decode(torch.float32)) for n in layers]
    error = sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt()
    identity = adapters.read_record(tmp_path).identity
    assert identity is not None
    estimate = identity.relative_error(identify(other))
    assert estimate is not None and abs(estimate - error) <= 0.15 * error  # of 256 samples
    assert f"differ by {estimate:.2%} of their RMS (256 samples)" in note
    assert "expected 14 x nf4, found 14 x q4_0" in note
    near = llama("nf4")
    with torch.no_grad():
        near.model.norm.weight[0] += 1
    (note,) = adapters.load_adapter(near, tmp_path, allow_mismatch=True).notes
    tensors = sum(1 for name, _ in near.named_parameters() if ".lora_" not in name)
    assert f": 1 of {tensors} tensors differ; the weights of the adapted layers differ by 0.00%" in note


def test_a_run_may_start_from_an_adapter_of_another_base_if_allowed(tmp_path: Path) -> None:
    saved(tmp_path)
    start = LoraAdapter(rank=2, target_modules=("q_proj", "up_proj"), path=str(tmp_path))
    adapters.attach(llama("nf4"), start, seed=0)
    with pytest.raises(AdapterError, match="trained on another base"):
        adapters.attach(llama("q4_0"), start, seed=0)
    allowed = start.model_copy(update={"allow_mismatch": True})
    assert any("another base" in note for note in adapters.attach(llama("q4_0"), allowed, seed=0).notes)


def test_files_of_other_programs_are_bound_to_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    adapters.load_adapter(llama("q4_0"), tmp_path)
    assert adapters.read_record(tmp_path).identity is None


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for text in ("[", "{}", '{"adapter": {}, "group_sizes": {}, "base": {"format": "x"}, "identity": null}'):
        save_file(load_file(path), path, metadata={"ingle": text})
        with pytest.raises(AdapterError, match="cannot be read"):
            adapters.load_adapter(llama("nf4"), tmp_path)


def test_qa_lora_is_written_as_plain_lora_and_known_again(tmp_path: Path) -> None:
    adapter = QaLoraAdapter(kind="qa_lora", rank=2, alpha=3.0, target_modules=("q_proj", "up_proj"))
    model = saved(tmp_path, "q5_1", adapter)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_a.shape == (2, 2)
    written = load_file(tmp_path / "adapter_model.safetensors")[key]
    assert torch.equal(written, layer.lora_a.repeat_interleave(32, 1))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "ingle"}
    again = llama("q5_1")
    adapters.load_adapter(again, tmp_path)
    assert again.model.layers[0].self_attn.q_proj.group_size == 32
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    config = adapters.adapter_config(tmp_path)
    assert isinstance(config, QaLoraAdapter) and config.scale == adapter.scale
    started = prepared("q5_1", config.model_copy(update={"path": str(tmp_path)}))
    assert torch.equal(started(IDS).logits, model(IDS).logits)
    plain = LoraAdapter(rank=2, alpha=3.0, target_modules=("q_proj", "up_proj"), path=str(tmp_path))
    torch.testing.assert_close(prepared("q5_1", plain)(IDS).logits, model(IDS).logits, rtol=2e-2, atol=2e-2)


def test_qa_lora_cannot_start_from_a_change_of_single_inputs(tmp_path: Path) -> None:
    saved(tmp_path, "q5_1")
    adapter = QaLoraAdapter(kind="qa_lora", rank=2, target_modules=("q_proj", "up_proj"), path=str(tmp_path))
    with pytest.raises(AdapterError, match="not constant within groups of 32"):
        prepared("q5_1", adapter)


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("q4_1", QaLoraAdapter(kind="qa_lora", rank=2, train_rounding=True)),
        ("q4_0", LoraAdapter(rank=2, merge_aware=MergeAware(fraction=0.5))),
        ("nf4", LoraAdapter(rank=2, merge_aware=MergeAware(format="q8_0"))),
    ],
    ids=["qa_lora", "merge-aware", "other-format"],
)
def test_an_adapter_trained_through_its_rounding_answers_merged(base: str, adapter: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, base, adapter)
    unmerged = model(IDS).logits
    adapters.Rounding(model, adapter, 4).prepare(5)
    merged = model(IDS).logits
    assert not torch.equal(merged, unmerged)
    again = llama(base)
    adapters.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(again(IDS).logits, merged)
    assert adapters.adapter_config(tmp_path).model_dump(include={"merge_aware", "train_rounding"}) == (
        adapter.model_dump(include={"merge_aware", "train_rounding"})
    )
