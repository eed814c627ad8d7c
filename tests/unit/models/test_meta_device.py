"""Models on the meta device: which are refused and why, dtypes, random initialisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from ingle import models
from ingle.config import ModelConfig, Nf4Base
from ingle.errors import ModelError
from ingle.models.loading.meta_device import build


def write_config(folder: Path, config: hf.PretrainedConfig) -> ModelConfig:
    config.save_pretrained(folder)
    return ModelConfig(id=str(folder), dtype="float32")


def test_a_meta_model_needs_no_memory(folder: Path) -> None:
    model = models.meta_model(ModelConfig(id=str(folder)), "cpu", torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.WhisperConfig(), "no encoder-decoder of text"),
        (hf.ViTConfig(), "no causal language model"),
        (hf.XLNetConfig(vocab_size=32), "its tokens see later tokens"),
        (hf.CLIPConfig(), "no model that predicts text"),
    ],
    ids=lambda value: value.model_type if isinstance(value, hf.PretrainedConfig) else "",
)
def test_other_kinds_of_models_are_refused_with_the_reason(tmp_path: Path, config, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        models.meta_model(write_config(tmp_path, config), "cpu", torch.float32)
    assert error.value.fix


BERT = hf.BertConfig(**TINY, num_attention_heads=2)
T5 = hf.T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)


@pytest.mark.parametrize(
    ("config", "task", "expected"),
    [
        (BERT, models.ModelTask(), hf.BertForMaskedLM),
        (hf.BertConfig(**TINY, num_attention_heads=2, is_decoder=True), models.ModelTask(), hf.BertLMHeadModel),
        (BERT, models.ModelTask("tag", ("O", "B-PER", "I-PER")), hf.BertForTokenClassification),
        (T5, models.ModelTask(), hf.T5ForConditionalGeneration),
        (T5, models.ModelTask("answer"), hf.T5ForQuestionAnswering),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_kind_and_task_choose_the_class(tmp_path: Path, config, task: models.ModelTask, expected: type) -> None:
    model = models.meta_model(write_config(tmp_path, config), "cpu", torch.float32, task)
    assert type(model) is expected
    assert models.task_of(model) == task
    if task.labels:
        assert tuple(model.config.id2label.values()) == task.labels
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert getattr(model.config, "hidden_dropout_prob", 0.1) == 0.1, "the saved config keeps its dropout"


def test_an_objective_for_another_kind_of_model_is_refused() -> None:
    models.require_kind(BERT, ("encoder",), "mlm")
    with pytest.raises(ModelError, match="The objective clm does not train this model: it is an encoder") as error:
        models.require_kind(BERT, ("causal",), "clm")
    assert "--objective.kind=mlm" in (error.value.fix or "")


def test_unknown_and_missing_configs_are_refused(tmp_path: Path) -> None:
    config = ModelConfig(id=str(tmp_path))
    with pytest.raises(ModelError, match=r"contains no config\.json"):
        models.meta_model(config, "cpu", torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from-the-future"}))
    with pytest.raises(ModelError, match="does not support the architecture") as error:
        models.meta_model(config, "cpu", torch.float32)
    assert "from-the-future" in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ModelError, match="its own Python code"):
        models.meta_model(config, "cpu", torch.float32)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        models.meta_model(config, "cpu", torch.float32)


def test_an_adapter_folder_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as error:
        models.meta_model(ModelConfig(id=str(tmp_path)), "cpu", torch.float32)
    assert "adapter.path" in str(error.value.fix)


def test_the_base_has_no_dropout_and_keeps_its_config() -> None:
    config = hf.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, resid_pdrop=0.3, bos_token_id=1, eos_token_id=2
    )
    model = build(config, torch.float32)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert model.config.resid_pdrop == 0.3 and config.resid_pdrop == 0.3


def test_compute_dtypes() -> None:
    assert models.compute_dtype("bfloat16", "cpu") is torch.bfloat16
    assert models.compute_dtype("float32", torch.device("cpu")) is torch.float32
    assert models.compute_dtype("auto", "cpu") in (torch.bfloat16, torch.float32)


def test_random_initialisation_is_the_architectures_own_and_needs_only_a_config(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.05, tie_word_embeddings=True,
    )  # fmt: skip
    source = write_config(tmp_path, config).model_copy(update={"init": "random"})
    model = models.load_model(source, seed=1)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert abs(weight.std().item() - 0.05) < 0.003
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inv_freq = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, inv_freq)


def test_random_initialisation_depends_on_the_seed_alone(folder: Path) -> None:
    source = ModelConfig(id=str(folder), dtype="float32", init="random")
    state = torch.random.get_rng_state()
    first = models.load_model(source, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "the state of the global generator changed"
    torch.manual_seed(99)
    again = models.load_model(source, seed=5).state_dict()
    other = models.load_model(source, seed=6).state_dict()
    half = models.load_model(source.model_copy(update={"dtype": "bfloat16"}), seed=5).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name].bfloat16(), half[name])


def test_random_weights_can_be_quantized(folder: Path) -> None:
    source = ModelConfig(id=str(folder), dtype="float32", init="random")
    plain = models.load_model(source, seed=5).model.layers[0].mlp.up_proj.weight
    quantized = models.load_model(source, Nf4Base(format="nf4"), seed=5).model.layers[0].mlp.up_proj
    error = (quantized.decode(torch.float32) - plain).norm() / plain.norm()
    assert 0 < error < 0.12
