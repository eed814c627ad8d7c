"""Merged weights, what survives of a change, and the bytes that are copied: against float64 and the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ingle import adapters, inference, models
from ingle.config.base import NoBase, base_section
from ingle.config.model import ModelConfig
from ingle.errors import ConfigError
from ingle.export.fidelity.measurement import measure
from ingle.export.writers.gguf_file import GgufExport
from ingle.export.writers.gguf_types import AS_TRAINED, choose_type
from ingle.export.writers.merged_model import MergedModel
from ingle.export.writers.safetensors_folder import choose_layout, write_safetensors
from ingle.gguf import read_gguf
from ingle.inference import Source

MakeAdapter = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def _source(folder: Path, adapter: Path | None = None, base: str = "none", dtype: str = "float32") -> Source:
    return Source(ModelConfig(id=str(folder), dtype=dtype), base_section(base), adapter)  # type: ignore[arg-type]


def _delta(adapter: Path, name: str) -> torch.Tensor:
    """``scale * B A`` in float64, straight from the file."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    return 2.0 * b @ a


def _write_hf(source: Source, folder: Path, type_name: str) -> None:
    layout = choose_layout(type_name, source.base)
    write_safetensors(MergedModel(source), models.load_tokenizer(source.model), source.model, folder, layout)


def test_a_merged_weight_is_the_base_and_its_change(
    llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter()
    _write_hf(_source(llama_folder, adapter), tmp_path, "f32")
    merged, base = load_file(tmp_path / "model.safetensors"), load_file(llama_folder / "model.safetensors")
    assert merged.keys() == base.keys()
    for name in (Q_PROJ, "model.layers.1.mlp.down_proj"):
        wanted = base[f"{name}.weight"].double() + _delta(adapter, name)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"].float())


@pytest.mark.parametrize("base", ["none", "nf4", "q4_k", "int8"])
def test_transformers_answers_with_merged_files_as_ingle_does_unmerged(
    llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path, base: str
) -> None:
    source = _source(llama_folder, make_adapter(base=base), base)
    _write_hf(source, tmp_path, "f32")
    ids = torch.tensor([[5, 17, 250, 33, 8, 299]])
    with torch.no_grad():
        ours = inference.open_source(source).model(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_packed_layouts_load_packed_and_copy_what_nothing_touches(
    llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    source = _source(llama_folder, make_adapter(base="nf4", skip=("k_proj",)), "nf4")
    _write_hf(source, tmp_path, "nf4")
    reopened = models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), base_section("nf4"))
    original = models.load_model(source.model, source.base)
    for name, same in (("k_proj", True), ("q_proj", False)):
        path = f"model.layers.0.self_attn.{name}"
        planes = [model.get_submodule(path).planes() for model in (reopened, original)]  # type: ignore[operator]
        assert torch.equal(planes[0]["codes"], planes[1]["codes"]) == same, name


def test_modules_trained_whole_are_written(llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(trainable_modules=("embed_tokens",))
    _write_hf(_source(llama_folder, adapter), tmp_path, "f32")
    merged = load_file(tmp_path / "model.safetensors")
    trained = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(
        merged["model.embed_tokens.weight"], trained["base_model.model.model.embed_tokens.weight"].float()
    )
    ids = torch.tensor([[5, 17, 250]])
    with torch.no_grad():
        ours = inference.open_source(_source(llama_folder, adapter)).model(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_one_weight_has_bytes_at_a_time(llama_folder: Path, make_adapter: MakeAdapter) -> None:
    model = MergedModel(_source(llama_folder, make_adapter(base="q8_0"), "q8_0"))
    for entry in model.stream.entries:
        with model.loaded(entry):
            real = [n for n, p in model.stream.model.named_parameters() if not p.is_meta and "lora_" not in n]
            assert len(real) == 1, real
    assert all(p.is_meta for n, p in model.stream.model.named_parameters() if "lora_" not in n)


def test_the_base_is_recognised_as_its_weights_pass(llama_folder: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base="nf4")
    for base, same in (("nf4", True), ("q8_0", False)):
        model = MergedModel(_source(llama_folder, adapter, base), checks_base=True)
        for entry in model.stream.entries:
            with model.loaded(entry):
                pass
        assert (model.explain_mismatch() is None) == same, base


def test_fidelity_is_what_float64_says(llama_folder: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(0.01, base="q4_0")
    model = MergedModel(_source(llama_folder, adapter, "q4_0"))
    entry = next(entry for entry in model.stream.entries if entry.name == f"{Q_PROJ}.weight")
    with model.loaded(entry) as loaded:
        before = loaded.base(torch.float32).double()
        planes, found = measure(loaded, "q", loaded.format)  # type: ignore[arg-type]
        data = loaded.holder.planes()["data"].numpy().copy()  # type: ignore[operator]
    assert isinstance(planes, dict)
    after = torch.from_numpy(gguf.quants.dequantize(planes["data"].numpy(), gguf.GGMLQuantizationType.Q4_0)).double()
    delta = _delta(adapter, Q_PROJ)
    survived = after - before
    assert found.correlation == pytest.approx(float((survived * delta).sum() / (survived.norm() * delta.norm())))
    assert found.gain == pytest.approx(float((survived * delta).sum() / delta.square().sum()))
    assert found.step == pytest.approx(float((after - before - delta).square().mean().mul(12).sqrt()), rel=1e-5)
    codes = [_codes_of_q4_0(each) for each in (data, planes["data"].numpy())]
    assert found.codes_changed == pytest.approx(float(np.mean(codes[0] != codes[1])), abs=1e-3)


def _codes_of_q4_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(len(data), -1, 18)[..., 2:]
    return np.concatenate((blocks & 15, blocks >> 4), axis=-1)


@pytest.mark.parametrize("base", ["q4_k", "q5_1", "q6_k", "q8_0", "tq2_0"])
def test_untouched_weights_are_copied_in_llama_cpps_order(
    llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path, base: str
) -> None:
    source = _source(llama_folder, make_adapter(base=base, skip=("k_proj", "down_proj")), base)
    path = tmp_path / "m.gguf"
    export = GgufExport(MergedModel(source), models.load_tokenizer(source.model), AS_TRAINED)
    found = export.write(path, {})
    file = read_gguf(path)
    original = models.load_model(source.model, source.base)
    k_proj = original.get_submodule("model.layers.0.self_attn.k_proj").planes()["data"].numpy()  # type: ignore[operator]
    rows = np.arange(128).reshape(4, 2, 16).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(file.tensors["blk.0.attn_k.weight"].read(), k_proj[rows])
    down = original.get_submodule("model.layers.0.mlp.down_proj").planes()["data"].numpy()  # type: ignore[operator]
    assert np.array_equal(file.tensors["blk.0.ffn_down.weight"].read(), down)
    assert export.num_copied == 4
    assert {each.name for each in found} == {
        f"blk.{i}.{n}.weight" for i in (0, 1) for n in ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    }


def test_a_gguf_base_with_an_empty_adapter_keeps_every_byte(llama_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    plain = _source(llama_folder)
    GgufExport(MergedModel(plain), models.load_tokenizer(plain.model), "q4_k_m").write(first, {"general.file_type": 15})
    model = models.load_model(ModelConfig(id=str(first), dtype="float32"), NoBase())
    from ingle.config.adapter import LoraAdapter

    adapters.attach(model, LoraAdapter(rank=2), seed=0)
    adapters.save_adapter(model, tmp_path / "adapter", LoraAdapter(rank=2), str(first))
    source = Source(ModelConfig(id=str(first), dtype="bfloat16"), NoBase(), tmp_path / "adapter")
    tokenizer = models.load_tokenizer(source.model)
    export = GgufExport(MergedModel(source), tokenizer, AS_TRAINED, base_file=read_gguf(first))
    export.write(second, {})
    assert export.num_copied == len(export.planned)
    before, after = read_gguf(first), read_gguf(second)
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name].type_name == tensor.type_name, name
        assert np.array_equal(after.tensors[name].read(), tensor.read()), name
    for key, value in before.metadata.items():
        if not key.startswith("general."):
            assert after.metadata[key] == value, key


def test_types_are_chosen_and_refused() -> None:
    assert choose_type(None, base_section("nf4")) == "q8_0"
    assert choose_type(None, base_section("q5_1")) == AS_TRAINED
    assert choose_type(None, base_section("q4_k_m")) == "q4_k_m"
    assert choose_type(None, NoBase(), from_gguf=True) == AS_TRAINED
    assert choose_type("Q4_K", NoBase()) == "q4_k_m"
    with pytest.raises(ConfigError, match="no GGUF type"):
        choose_type("q9", NoBase())
    with pytest.raises(ConfigError, match="Weights cannot be quantized to iq2_xs") as read_only:
        choose_type("iq2_xs", NoBase())
    assert "long search" in str(read_only.value.why)
    with pytest.raises(ConfigError, match="does not support nf4"):
        choose_type(AS_TRAINED, base_section("nf4"))
    with pytest.raises(ConfigError, match="no safetensors type") as caught:
        choose_layout("q4_k_m", NoBase())
    assert "--to gguf --type q4_k_m" in str(caught.value)
