"""Compares the logits of a GGUF model with its decoded tensors, transformers' reader and llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ingle import models, quant
from ingle.config.base import base_section
from ingle.config.model import ModelConfig
from ingle.errors import GgufError, ModelError
from ingle.events import Warned
from ingle.gguf import TensorToWrite, read_gguf, write_gguf
from ingle.gguf.container import block_of
from ingle.models import Model, load_model, load_tokenizer
from ingle.quant import QuantEmbedding, QuantLinear
from tests.tiny import PLAIN_DECODERS

EMBER = Path(__file__).parents[2] / "examples/models/ember-6m"
TEXTS = ["Hello world", " 12 + 345 = ", "naïve café 🦙\n\n\tx", "<|im_start|>user\nHi<|im_end|>\n"]
IDS = torch.tensor([[5, 700, 44, 4000, 3, 17, 17, 999]])

Write = Callable[[Path, Path, str], Path]


@pytest.fixture(scope="module", params=["f32", "q8_0", "q4_k_m"])
def ember(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gguf_of: Write) -> Path:
    return gguf_of(EMBER, tmp_path_factory.mktemp("ember") / f"ember-{request.param}.gguf", request.param)


def load(path: Path, **options: Any) -> Model:
    return load_model(ModelConfig(id=str(path), dtype="float32"), **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits[0].float()


def decoded(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by transformers' name: the ``gguf`` package's reader and decoder, llama.cpp's formula."""
    config = AutoConfig.from_pretrained(EMBER)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    by_gguf = {
        table.get_name(name, (".weight",)): name for name in AutoModelForCausalLM.from_config(config).state_dict()
    }
    values = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            rows, columns = value.shape
            value = (
                value.reshape(heads[kind], rows // heads[kind] // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
            )
        values[by_gguf[tensor.name]] = torch.from_numpy(np.array(value))
    return values


def test_logits_are_those_of_the_decoded_tensors(ember: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(EMBER, dtype=torch.float32).eval()
    values = decoded(ember)
    reference.load_state_dict(values | {"lm_head.weight": values["model.embed_tokens.weight"]})
    torch.testing.assert_close(logits(load(ember)), logits(reference), rtol=1e-4, atol=1e-4)


def test_transformers_reads_the_same_from_the_file(ember: Path) -> None:
    if "q4_k_m" not in ember.name:
        return  # it takes seconds, and this one holds plain numbers and two formats
    theirs = AutoModelForCausalLM.from_pretrained(ember.parent, gguf_file=ember.name, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(load(ember)), logits(theirs), rtol=1e-4, atol=1e-4)


def test_tokenizer_and_template_are_those_of_the_folder(ember: Path) -> None:
    ours, original = load_tokenizer(ModelConfig(id=str(ember))), AutoTokenizer.from_pretrained(EMBER)
    for text in TEXTS:
        assert ours(text, return_offsets_mapping=True) == original(text, return_offsets_mapping=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    assert ours.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)
    assert ours.all_special_tokens == original.all_special_tokens
    assert (ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (3, 0, 1)
    assert load(ember).generation_config.eos_token_id == [3, 0]


def test_the_config_is_that_of_the_folder(ember: Path) -> None:
    ours, original = load(ember).config.to_dict(), AutoConfig.from_pretrained(EMBER).to_dict()
    own = {"dtype", "transformers_version", "_name_or_path", "eos_token_id"}
    assert {key: ours[key] for key in ours.keys() - own} == {key: original[key] for key in original.keys() - own}


def test_layers_hold_the_bytes_of_the_file(ember: Path) -> None:
    model, file = load(ember), read_gguf(ember)
    quantized = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear | QuantEmbedding)
    }
    if "f32" in ember.name:
        assert not quantized
        return
    assert len(quantized) == 7 * 6 + 2
    value, query = quantized["model.layers.0.self_attn.v_proj"], quantized["model.layers.0.self_attn.q_proj"]
    assert torch.equal(value.get_parameter("data"), torch.from_numpy(file.tensors["blk.0.attn_v.weight"].read()))
    stored = torch.from_numpy(file.tensors["blk.0.attn_q.weight"].read())
    assert torch.equal(query.get_parameter("data"), stored.view(8, 16, 2, -1).transpose(1, 2).reshape(stored.shape))
    assert quantized["lm_head"].get_parameter("data") is quantized["model.embed_tokens"].get_parameter("data")
    audit = quant.audit(model)
    assert not audit.unquantized and set(audit.bytes_by_dtype) == {"uint8", "float32"}


def random_model(model_type: str, folder: Path, **changes: Any) -> Path:
    """A small model whose logits differ clearly, with the bundled tokenizer."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "max_position_embeddings": 256,
        "tie_word_embeddings": model_type.startswith("gemma"),
        "query_pre_attn_scalar": 32,
        "sliding_window": 4 if model_type in ("gemma2", "gemma3_text") else None,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    if model_type == "qwen2":
        settings["head_dim"] = 16  # it is hidden_size / num_attention_heads there
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.3 if name.endswith("bias") or "norm" in name else 0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBER / name, folder)
    return folder


@pytest.mark.parametrize("model_type", PLAIN_DECODERS)
def test_every_architecture_computes_what_llama_cpp_computes(
    model_type: str, llama_cpp: Any, gguf_of: Write, tmp_path: Path
) -> None:
    folder = random_model(model_type, tmp_path)
    path = gguf_of(folder, tmp_path / "model.gguf", "f32")
    ours = logits(load(path))
    torch.testing.assert_close(
        ours, logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()), rtol=1e-3, atol=1e-3
    )
    engine = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    engine.eval(IDS[0].tolist())
    theirs = torch.from_numpy(np.array(engine.scores[: IDS.shape[1]]))
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.max() < 1e-2, error  # its cache of keys and values is float16


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any], dict[str, TensorToWrite]], None]) -> Path:
    """A copy of a file with something changed."""
    file = read_gguf(path)
    metadata = dict(file.metadata)
    tensors = {t.name: TensorToWrite(t.name, t.type_name, t.shape, t.read) for t in file.tensors.values()}
    change(metadata, tensors)
    write_gguf(target, metadata, tensors.values())
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, gguf_of: Write) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return gguf_of(random_model("llama", folder), folder / "small.gguf", "q8_0")


def test_what_is_missing_or_does_not_fit_is_named(small: Path, tmp_path: Path) -> None:
    def message(change: Callable[[dict[str, Any], dict[str, TensorToWrite]], None]) -> str:
        with pytest.raises(ModelError) as info:
            load(rewritten(small, tmp_path / "x.gguf", change))
        return str(info.value)

    def shorten(metadata: dict[str, Any], tensors: dict[str, TensorToWrite]) -> None:
        old = tensors["blk.1.ffn_up.weight"]
        tensors[old.name] = TensorToWrite(old.name, "q8_0", (95, 64), lambda: old.data()[:95])

    def unread(metadata: dict[str, Any], tensors: dict[str, TensorToWrite]) -> None:
        tensors["blk.1.ffn_up.weight"] = TensorToWrite(
            "blk.1.ffn_up.weight", "i8", (96, 64), lambda: np.zeros((96, 64), "i1")
        )

    assert "model.layers.1.mlp.up_proj.weight" in message(lambda metadata, tensors: tensors.pop("blk.1.ffn_up.weight"))
    assert "(95, 64) in the file, (96, 64) expected from the metadata" in message(shorten)
    assert "blk.1.ffn_up.weight has the type i8" in message(unread)
    assert "'rwkv7' are not supported" in message(
        lambda metadata, tensors: metadata.update({"general.architecture": "rwkv7"})
    )
    small.with_name("cut.gguf").write_bytes(small.read_bytes()[:-4096])
    with pytest.raises(GgufError, match="damaged or incomplete"):
        load(small.with_name("cut.gguf"))
    with pytest.raises(ModelError, match="There is no file"):
        load(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelError, match="A GGUF model must be named by its file") as info:
        folder = tmp_path / "folder"
        folder.mkdir()
        shutil.copy(EMBER / "config.json", folder)
        shutil.copy(small, folder / "a.gguf")
        load(folder)
    assert f"--model.id={folder / 'a.gguf'}" in str(info.value)


def test_a_base_format_must_be_that_of_the_file(small: Path) -> None:
    assert torch.equal(logits(load(small, base=base_section("q8_0"))), logits(load(small)))
    with pytest.raises(
        ModelError, match=r"stores model.layers.0.self_attn.q_proj as q8_0, but base.format requests nf4"
    ):
        load(small, base=base_section("nf4"))


def test_plain_numbers_are_quantized_as_the_base_asks(gguf_of: Write, tmp_path: Path) -> None:
    path = gguf_of(EMBER, tmp_path / "x.gguf", "f32")  # exact; float16 has not the smallest of its bfloat16 numbers
    model = load(path, base=base_section("q4_k_m"))
    folder = load_model(ModelConfig(id=str(EMBER), dtype="float32"), base_section("q4_k_m"))
    for name, module in folder.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.get_parameter("data"), model.get_submodule(name).get_parameter("data")), name


def test_a_mix_as_base_holds_the_bytes_of_a_file_of_that_type(gguf_of: Write, tmp_path: Path) -> None:
    file = load(gguf_of(EMBER, tmp_path / "x.gguf", "q3_k_m"))
    folder = load_model(ModelConfig(id=str(EMBER), dtype="float32"), base_section("q3_k_m"))
    quantized = {name: module for name, module in folder.named_modules() if isinstance(module, QuantLinear)}
    assert {module.format.name for module in quantized.values()} == {"q3_k", "q4_k", "q5_k"}
    for name, module in quantized.items():
        assert torch.equal(module.get_parameter("data"), file.get_submodule(name).get_parameter("data")), name


def test_all_of_gemma_is_quantized(gguf_of: Write, tmp_path: Path) -> None:
    folder = random_model("gemma3_text", tmp_path)
    model = load(gguf_of(folder, tmp_path / "gemma.gguf", "q8_0"))
    assert not quant.audit(model).unquantized
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (logits(model) - logits(reference)).norm() / logits(reference).norm() < 0.05


def test_types_that_base_does_not_support_are_decoded_with_a_warning(small: Path) -> None:
    config, told = ModelConfig(id=str(small), dtype="float32"), list[Any]()
    model = models.meta_model(config, "cpu", torch.float32)
    models.load_weights(model, config, "cpu", torch.float32, sink=told.append)
    warned = [event.message for event in told if isinstance(event, Warned)]
    assert len(warned) == 2 + 3 * 7
    assert "model.embed_tokens.weight is q8_0 in the file and is loaded as float32." in warned
    torch.testing.assert_close(logits(model.eval()), logits(load(small)), rtol=1e-4, atol=1e-4)


#: Where the float16 scale of a block is, by type; the other bytes may be anything.
SCALES = {
    **{"iq2_xxs": 0, "iq2_xs": 0, "iq2_s": 0, "iq3_xxs": 0, "iq3_s": 0, "iq1_s": 0, "iq4_xs": 0, "q5_0": 0},
    **{"q6_k": 208, "q3_k": 108, "tq1_0": 52, "tq2_0": 64},
}


def test_types_that_are_only_read_are_read_too(gguf_of: Write, tmp_path: Path) -> None:
    """Every layer's ``down_proj`` in another type, of bytes that no encoder made."""
    rng = np.random.default_rng(0)
    original = gguf_of(EMBER, tmp_path / "ember.gguf", "f32")
    kinds = list(SCALES)
    for first in range(0, len(kinds), 6):
        chosen = kinds[first : first + 6]

        def change(metadata: dict[str, Any], tensors: dict[str, TensorToWrite], chosen: list[str] = chosen) -> None:
            for layer, kind in enumerate(chosen):
                name, shape = f"blk.{layer}.ffn_down.weight", (256, 768)
                size, num_bytes = block_of(kind)
                blocks = rng.integers(0, 256, (256, 768 // size, num_bytes), dtype=np.uint8)
                scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
                blocks[..., SCALES[kind] : SCALES[kind] + 2] = scale
                tensors[name] = TensorToWrite(name, kind, shape, lambda blocks=blocks: blocks)

        path = rewritten(original, tmp_path / f"mixed-{first}.gguf", change)
        model = load(path)
        held = {name: module.format.name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        assert held == {f"model.layers.{layer}.mlp.down_proj": kind for layer, kind in enumerate(chosen)}
        reference = AutoModelForCausalLM.from_pretrained(EMBER, dtype=torch.float32).eval()
        values = decoded(path)
        reference.load_state_dict(values | {"lm_head.weight": values["model.embed_tokens.weight"]})
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)


def test_a_damaged_tokenizer_is_told(small: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: dict[str, TensorToWrite]) -> None:
        metadata["tokenizer.ggml.merges"][7] = "one"

    path = rewritten(small, tmp_path / "x.gguf", change)
    with pytest.raises(GgufError, match=r"The tokenizer in x\.gguf cannot be read"):
        load_tokenizer(ModelConfig(id=str(path)))
    assert load_tokenizer(ModelConfig(id=str(path), tokenizer=str(EMBER))).eos_token_id == 3
    assert load_tokenizer(ModelConfig(id=str(EMBER), tokenizer=str(small))).eos_token_id == 3


def test_an_untied_head_is_its_own(small: Path) -> None:
    model = load(small)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding) and isinstance(head, QuantLinear)
    assert head.format.name == "q8_0" and not torch.equal(head.get_parameter("data"), embedding.get_parameter("data"))
    assert torch.equal(models.head(model).weight, head.decode(torch.float32))
    assert json.loads(json.dumps(quant.audit(model).to_dict()))["quantized"] > 0
