"""Exports of adapters on every kind of base, read by other programs: exact where they should be, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray
from safetensors.torch import load_file

from ingle import adapters, inference, models
from ingle.config.base import base_section
from ingle.config.model import ModelConfig
from ingle.errors import ConfigError, ExportError
from ingle.export import export
from ingle.export.writers.merged_model import MergedModel
from ingle.export.writers.safetensors_folder import choose_layout, write_safetensors

MakeAdapter = Callable[..., Path]
IDS = [5, 17, 250, 33, 8, 299, 41]
#: A weight whose rows no program permutes, by the names of the hub and of GGUF.
DOWN, FFN_DOWN = "model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp's Python binding: make judge")


def logits_of(source: inference.Source) -> torch.Tensor:
    """Ingle's logits in float32."""
    plain = inference.Source(source.model.model_copy(update={"dtype": "float32"}), source.base, source.adapter)
    with torch.no_grad():
        logits: torch.Tensor = inference.open_source(plain).model(input_ids=torch.tensor([IDS])).logits[0]
    return logits


def weight_of(folder: Path) -> NDArray[np.float64]:
    """A weight of the base in 16 bits."""
    values: NDArray[np.float64] = load_file(folder / "model.safetensors")[f"{DOWN}.weight"].double().numpy()
    return values


def delta_of(adapter: Path) -> NDArray[np.float64]:
    """What the adapter adds to it, as PEFT reads its files."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    low, high = (tensors[f"base_model.model.{DOWN}.lora_{name}.weight"].double() for name in "AB")
    change: NDArray[np.float64] = (settings["lora_alpha"] / settings["r"] * (high @ low)).numpy()
    return change


def read_blocks(path: Path) -> tuple[GGMLQuantizationType, NDArray[np.uint8]]:
    """The weight's type and bytes, by the gguf package."""
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == FFN_DOWN)
    return tensor.tensor_type, np.array(tensor.data)


@pytest.mark.parametrize("train_rounding", [False, True])
@pytest.mark.parametrize("base", ["q4_1", "q5_1"])
def test_qa_lora_goes_into_the_offsets_and_nowhere_else(
    llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path, base: str, train_rounding: bool
) -> None:
    adapter = make_adapter(base=base, kind="qa_lora", train_rounding=train_rounding)
    path = tmp_path / "m.gguf"
    export(str(adapter), "gguf", path)
    kind, blocks = read_blocks(path)
    assert kind.name.lower() == base
    size = gguf.GGML_QUANT_SIZES[kind][1]
    merged = blocks.reshape(-1, size)
    plain = gguf.quants.quantize(weight_of(llama_folder).astype(np.float32), kind).reshape(-1, size)
    assert np.array_equal(merged[:, :2], plain[:, :2]) and np.array_equal(merged[:, 4:], plain[:, 4:])
    before, after = (each[:, 2:4].copy().view(np.float16).ravel() for each in (plain, merged))
    change = delta_of(adapter).reshape(-1, 32)
    assert np.ptp(change, axis=1).max() < 1e-12 < np.abs(change).max()
    wanted = (before.astype(np.float64) + change[:, 0]).astype(np.float16)
    steps = np.abs(after.view(np.int16).astype(int) - wanted.view(np.int16).astype(int))
    assert steps.max() <= 1 and (steps > 0).mean() < 1e-2  # float32 sums may fall on the other side of a half
    trained, served = logits_of(inference.locate(str(adapter))), logits_of(inference.locate(str(path)))
    error = float((served - trained).abs().max())
    assert error < (1e-5 if train_rounding else 0.05)
    assert train_rounding or error > 1e-5  # the rounding of the offsets, which training had not seen


def unpack(tensors: dict[str, torch.Tensor], bits: int) -> NDArray[np.float64]:
    """The hqq package's tensors of the weight as float64: codes in stripes, ``(code - zero) * scale``."""
    numbers, scale, zero = (tensors[f"{DOWN}.{key}"].double().numpy() for key in ("W_q", "scale", "zero"))
    per_number, integer = {4: (2, np.int64), 3: (10, np.int64)}[bits]
    shifts = [bits * index for index in range(per_number - 1, -1, -1)]
    codes = np.concatenate([(numbers.astype(integer) >> shift) & (2**bits - 1) for shift in shifts])[: len(scale)]
    shape = tensors[f"{DOWN}.shape"].tolist()
    values: NDArray[np.float64] = ((codes - zero) * scale).reshape(shape)
    return values


@pytest.mark.parametrize(("bits", "size", "train_rounding"), [(4, 64, False), (4, 64, True), (3, 32, True)])
def test_qa_lora_goes_into_hqqs_zeros(
    make_adapter: MakeAdapter, tmp_path: Path, bits: int, size: int, train_rounding: bool
) -> None:
    base = {"format": "hqq", "bits": bits, "group_size": size}
    adapter = make_adapter(base=base, kind="qa_lora", train_rounding=train_rounding)
    still = make_adapter(0.0, base=base, kind="qa_lora")
    out = tmp_path / "merged"
    export(str(adapter), "safetensors", out, type="hqq")
    export(str(still), "safetensors", tmp_path / "plain", type="hqq")
    merged, plain = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "plain"))
    differing = {key.rpartition(".")[2] for key in merged if not torch.equal(merged[key], plain[key])}
    assert differing == {"zero"}
    error = np.abs(unpack(merged, bits) - unpack(plain, bits) - delta_of(adapter))
    step = merged[f"{DOWN}.scale"].double().numpy()
    assert (error.reshape(-1, size) <= step * np.abs(merged[f"{DOWN}.zero"].double().numpy()) / 2048 + 1e-9).all()
    trained, written = logits_of(inference.locate(str(adapter))), logits_of(inference.locate(str(out)))
    assert float((written - trained).abs().max()) < (0.02 if train_rounding else 0.1)  # the ends are bfloat16 there
    with pytest.raises(ConfigError, match="does not support hqq"):
        export(str(adapter), "gguf", tmp_path / "m.gguf", type="as-trained")


@pytest.mark.skipif(find_spec("hqq") is None, reason="needs the hqq package")
def test_the_hqq_package_answers_as_ingle_does(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(base={"format": "hqq", "bits": 3}, kind="qa_lora", train_rounding=True)
    result = export(str(adapter), "safetensors", tmp_path / "out", type="hqq", verify=True)
    assert result.certificate.passed and result.certificate.agreement.mean_kl < 1e-6


@pytest.mark.parametrize("group_size", ["tensor", "row", 256])
def test_lora_on_a_ternary_base_merges_into_wider_types(
    llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path, group_size: Any
) -> None:
    adapter = make_adapter(base={"format": "ternary", "group_size": group_size})
    path = tmp_path / "m.gguf"
    export(str(adapter), "gguf", path, type="f32")
    weight, change = weight_of(llama_folder), delta_of(adapter)
    groups = weight.reshape({"tensor": (1, -1), "row": (len(weight), -1)}.get(group_size, (-1, 256)))
    scale = np.abs(groups).mean(axis=1, keepdims=True)
    scale = torch.from_numpy(scale).bfloat16().double().numpy()  # as stored by a ternary base
    ternary = (np.clip(np.round(groups / scale), -1, 1) * scale).reshape(weight.shape)
    kind, values = read_blocks(path)
    assert kind == GGMLQuantizationType.F32
    error = np.abs(values.view(np.float32) - ternary - change)
    assert np.quantile(error, 0.999) < 1e-6 and (error > 1e-6).mean() < 1e-3  # where weight / scale is nearly 0.5
    for type_name in ("tq2_0", "tq1_0"):  # three levels cannot represent a small change
        with pytest.raises(ExportError, match="too much"):
            export(str(adapter), "gguf", tmp_path / type_name, type=type_name)
    with pytest.raises(ConfigError, match="does not support ternary"):
        export(str(adapter), "gguf", tmp_path / "x", type="as-trained")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "m.Modelfile", "m.fidelity.json", "m.fidelity.md", "m.gguf", "m.md"
    ]  # fmt: skip


@needs_llama
@pytest.mark.parametrize("base", ["ternary", "tq2_0", "hqq"])
def test_the_adapter_alone_is_served_on_such_bases(make_adapter: MakeAdapter, tmp_path: Path, base: str) -> None:
    result = export(str(make_adapter(base=base)), "gguf-adapter", tmp_path / "lora", verify=True)
    assert result.certificate.passed


@needs_llama
@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("q5_1", {"kind": "qa_lora", "train_rounding": True}),
        ("hqq", {"kind": "qa_lora"}),
        ("ternary", {}),
        ("q4_k", {"merge_aware": {}}),
    ],
)
def test_llama_cpp_serves_the_trained_model(
    make_adapter: MakeAdapter, tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    made = export(str(make_adapter(base=base, **options)), "gguf", tmp_path / "out", verify=True).certificate
    assert made.passed and made.trained.mean_kl < 1e-2


@pytest.mark.parametrize(
    ("base", "format", "type_name", "lost"),
    [
        ("q4_k", None, None, False),
        ("nf4", "q4_0", "q4_0", False),
        ("q4_k", None, "q4_0", True),
        ("nf4", "q4_0", "q4_k_m", True),
    ],
)
def test_only_another_rounding_than_in_training_loses(
    make_adapter: MakeAdapter, tmp_path: Path, base: str, format: str | None, type_name: str | None, lost: bool
) -> None:
    """Most of such a small change does not survive, but training used what survived."""
    adapter = make_adapter(0.01, base=base, merge_aware={"format": format})
    if lost:
        with pytest.raises(ExportError, match="too much"):
            export(str(adapter), "gguf", tmp_path / "m.gguf", type=type_name)
        return
    report = export(str(adapter), "gguf", tmp_path / "m.gguf", type=type_name).fidelity
    assert report.mean_correlation < 0.5
    merged = adapters.lora_modules(inference.open_model(str(adapter)).model)[DOWN].merged
    assert merged is not None
    kind, blocks = read_blocks(tmp_path / "m.gguf")
    assert kind.name.lower() == (format or base)
    assert np.array_equal(blocks, merged.planes["data"].numpy())


@pytest.mark.parametrize("type_name", ["nf4", "fp4", "int8", "hqq-3-g32"])
def test_a_quantized_folder_opens_in_its_format(make_adapter: MakeAdapter, tmp_path: Path, type_name: str) -> None:
    out = tmp_path / "merged"
    export(str(make_adapter()), "safetensors", out, type=type_name, allow_loss=True)
    source = inference.locate(str(out))
    wanted = {"nf4": {"double_quant": True}, "hqq-3-g32": {"bits": 3, "group_size": 32}}.get(type_name, {})
    assert source.base.format == type_name.partition("-")[0]
    assert all(getattr(source.base, key) == value for key, value in wanted.items())
    assert logits_of(source).isfinite().all()
    again = export(str(out), "gguf", tmp_path / "m.gguf", type="q8_0")
    assert again.type == "q8_0"


def test_blocks_of_another_size_open_too(llama_folder: Path, tmp_path: Path) -> None:
    """The config of bitsandbytes does not store the block size."""
    source = inference.Source(ModelConfig(id=str(llama_folder)), base_section({"format": "nf4", "block_size": 128}))
    model = MergedModel(source)
    layout = choose_layout("nf4", source.base)
    tokenizer = models.load_tokenizer(source.model)
    write_safetensors(model, tokenizer, source.model, tmp_path, layout)
    assert inference.locate(str(tmp_path)).base == source.base
    assert torch.equal(logits_of(inference.locate(str(tmp_path))), logits_of(source))
