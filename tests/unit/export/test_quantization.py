"""``ingle quantize``: the written files, the reported losses, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ingle import models
from ingle.config import ModelConfig
from ingle.config.base import base_section
from ingle.errors import ConfigError, GgufError
from ingle.evaluation.format_survey.candidates import list_candidates
from ingle.events import Progress
from ingle.export import quantize
from ingle.gguf import read_gguf
from ingle.gguf.imatrix import read_imatrix
from ingle.quant import make_format
from ingle.quant.imatrix_collector import linear_maps
from tests.conftest import make_tokenizer
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    return write_llama(path, make_tokenizer(), dtype=torch.bfloat16, **sizes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"the quick brown fox number {i} jumps"}) + "\n" for i in range(40)))
    return path


def quantized_with(weight: torch.Tensor, kind: str, importance: torch.Tensor | None = None) -> np.ndarray[Any, Any]:
    format = make_format(base_section({"format": kind}))
    assert format is not None
    return format.encode(weight.float(), importance)["data"].numpy()


def test_a_gguf_file_holds_what_the_encoders_make(folder: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    result = quantize(str(folder), "q4_k_m", tmp_path / "m.gguf", sink=events.append)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for hf_name, name in (("mlp.gate_proj", "ffn_gate"), ("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        tensor = tensors[f"blk.1.{name}.weight"]
        weight = model.get_parameter(f"model.layers.1.{hf_name}.weight").detach()
        np.testing.assert_array_equal(tensor.read(), quantized_with(weight, tensor.type_name))
    assert {event.stage for event in events if isinstance(event, Progress)} == {"Writing weights", "Reading back"}
    assert result.path == (tmp_path / "m.gguf") and result.container == "gguf"
    assert result.num_bytes_before == (folder / "model.safetensors").stat().st_size
    assert result.num_weights == sum(parameter.numel() for parameter in model.parameters())
    assert result.num_bytes == sum(tensor.num_bytes for tensor in tensors.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
    printed = result.to_dict()
    assert list(printed) == [
        "path", "to", "container", "num_weights", "num_bytes_before", "num_bytes", "bits_per_weight", "imatrix",
        "classes",
    ]  # fmt: skip
    keys = ["types", "num_weights", "num_bytes", "bits_per_weight", "relative_error"]
    assert all(list(loss) == keys for loss in printed["classes"].values())


def test_the_error_of_a_class_is_that_of_its_weights(folder: Path, tmp_path: Path) -> None:
    classes = quantize(str(folder), "q4_0", tmp_path / "m.gguf").classes
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    format = make_format(base_section("q4_0"))
    assert format is not None
    error = energy = 0.0
    for layer in range(2):
        weight = model.get_parameter(f"model.layers.{layer}.self_attn.q_proj.weight").detach().double()
        decoded = format.decode(format.encode(weight.float()), *weight.shape, torch.float32).double()
        error, energy = error + float((decoded - weight).square().sum()), energy + float(weight.square().sum())
    assert classes["attn_q"].relative_error == pytest.approx((error / energy) ** 0.5, rel=1e-9)
    assert classes["attn_q"].bits_per_weight == 4.5 and classes["attn_q"].types == {"q4_0": 2 * 256 * 256}
    assert classes["norms and biases"].relative_error == 0
    assert 0.01 < classes["output"].relative_error < 0.03  # q6_k


@pytest.mark.parametrize("to", ["q4_0", "q5_k_m", "nf4", "int8", "hqq-2"])
def test_the_table_of_formats_says_the_same_size(folder: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / ("m.gguf" if to.startswith("q") else "m")
    result = quantize(str(folder), to, out)
    model = models.meta_model(ModelConfig(id=str(folder)), "cpu", torch.bfloat16)
    ((candidate,), _) = list_candidates(model, [f"{name}.weight" for name in linear_maps(model)], [to])
    assert result.num_bytes == candidate.size_bytes
    assert result.bits_per_weight == pytest.approx(8 * candidate.size_bytes / sum(candidate.types.values()))


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8", "hqq-4"])
def test_a_folder_opens_in_ingle(folder: Path, tmp_path: Path, to: str) -> None:
    quantize(str(folder), to, tmp_path / "quantized")
    section = base_section({"format": "hqq", "bits": 4} if to == "hqq-4" else to)
    model = models.load_model(ModelConfig(id=str(tmp_path / "quantized"), dtype="float32"), section)
    expected = models.load_model(ModelConfig(id=str(folder), dtype="float32"), section)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_an_nf4_folder_opens_in_transformers(folder: Path, tmp_path: Path) -> None:
    import warnings

    quantize(str(folder), "nf4", tmp_path / "quantized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32, device_map="cpu").eval()
        ids = torch.arange(12)[None]
        with torch.no_grad():
            logits = theirs(input_ids=ids).logits.float()
    ours = models.load_model(ModelConfig(id=str(tmp_path / "quantized"), dtype="float32"), base_section("nf4"))
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.02  # bitsandbytes multiplies in bfloat16 here


def test_an_importance_matrix_is_gathered_used_and_kept(folder: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "new" / "imatrix.gguf"
    result = quantize(str(folder), "q4_k_s", tmp_path / "a.gguf", imatrix=kept, data=text, num_tokens=300)
    assert result.imatrix == str(kept)
    matrix = read_imatrix(kept)
    assert set(matrix.entries) == {
        f"blk.{layer}.{kind}.weight"
        for layer in range(2)
        for kind in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    tensor = read_gguf(tmp_path / "a.gguf").tensors["blk.0.ffn_down.weight"]
    importance = torch.from_numpy(matrix.entries["blk.0.ffn_down.weight"].mean[0])
    np.testing.assert_array_equal(tensor.read(), quantized_with(weight, tensor.type_name, importance))
    assert not np.array_equal(tensor.read(), quantized_with(weight, tensor.type_name))

    quantize(str(folder), "q4_k_s", tmp_path / "b.gguf", imatrix=kept)
    again = read_gguf(tmp_path / "b.gguf").tensors
    for name, first in read_gguf(tmp_path / "a.gguf").tensors.items():
        np.testing.assert_array_equal(first.read(), again[name].read())


def test_nothing_is_overwritten_or_left_incomplete(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        quantize(str(folder), "q4_0", tmp_path / "m.gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        quantize(str(folder), "nf4", tmp_path / "full")

    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.stage == "Reading back":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(str(folder), "q8_0", tmp_path / "cut.gguf", sink=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_quantized_model_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    quantize(str(folder), "q8_0", tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="already quantized to q8_0"):
        quantize(str(tmp_path / "m.gguf"), "q4_0", tmp_path / "n.gguf")


def test_contradicting_options_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            quantize(**{"model": str(folder), "to": "q4_0", "out": tmp_path / "m.gguf", **options})

    refused("There is no format", to="q4_km")
    refused("does not use", to="nf4", out=tmp_path / "m", data=text)
    refused("does not use", to="bf16", data=text)
    refused("There is no such file", imatrix=tmp_path / "none.gguf")
    refused("exists", imatrix=text, data=text)
    refused("folder", to="nf4")
    with pytest.raises(GgufError, match="importance matrix"):
        quantize(str(folder), "q4_0", tmp_path / "m.gguf", imatrix=text)
    assert list(tmp_path.iterdir()) == []


def test_hqq_weights_its_error_too(folder: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "imatrix.gguf"
    quantize(str(folder), "hqq-3", tmp_path / "weighed", imatrix=kept, data=text, num_tokens=300)
    section = base_section({"format": "hqq", "bits": 3})
    model = models.load_model(ModelConfig(id=str(tmp_path / "weighed")), section)
    plain = models.load_model(ModelConfig(id=str(folder)))
    importance = models.load_importance(plain, kept)
    name = "model.layers.1.mlp.up_proj"
    format = make_format(section)
    assert format is not None
    expected = format.encode(plain.get_parameter(f"{name}.weight").detach().float(), importance[f"{name}.weight"])
    assert all(torch.equal(model.get_parameter(f"{name}.{plane}"), expected[plane]) for plane in expected)


def test_the_importance_matrix_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    from ingle.errors import ModelError
    from ingle.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix

    entry = ImatrixEntry(np.ones((1, 99), np.float32), np.ones(1, np.float32))
    for name in ("blk.0.attn_q.weight", "something.else"):
        write_imatrix(tmp_path / "other.gguf", Imatrix({name: entry}))
        with pytest.raises(ModelError, match="importance matrix"):
            quantize(str(folder), "q4_0", tmp_path / "m.gguf", imatrix=tmp_path / "other.gguf")
