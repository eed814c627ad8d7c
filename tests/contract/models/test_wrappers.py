"""Multimodal checkpoints as they are published: their text part is loaded, trained and saved under its own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

from ingle import adapters, models
from ingle.config import ModelConfig
from ingle.config.adapter import LoraAdapter
from ingle.config.base import BaseConfig, NoBase, base_section
from ingle.errors import QuantizationError
from ingle.events import Event, Warned
from ingle.export.writers.merged_model import MergedModel
from ingle.export.writers.safetensors_folder import choose_layout, write_safetensors
from ingle.inference import Source
from ingle.models.forward.hidden_states import forward_packed
from ingle.models.interop.towers import stored_towers
from ingle.models.loading.layout_choice import enliven
from ingle.models.loading.small_config import Size, shrink
from ingle.models.loading.weight_stream import WeightStream
from ingle.models.text_part import build_text_part, build_wrapper
from ingle.quant.experts import QuantStack, is_experts
from ingle.quant.linear import QuantLinear

_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_AXES = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _gemma3() -> hf.PretrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _TEXT | {"sliding_window": 8, "layer_types": kinds}
    return hf.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=300)


def _mistral3() -> hf.PretrainedConfig:
    text = _TEXT | {"model_type": "mistral", "sliding_window": None}
    return hf.Mistral3Config(text_config=text, vision_config=_VISION | {"model_type": "pixtral"}, image_token_index=300)


def _qwen2_5_vl() -> hf.PretrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
    tokens = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302}
    return hf.Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": _AXES}, vision_config=vision, **tokens)


def _mllama() -> hf.PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = _TEXT | {"cross_attention_layers": [1], "rope_parameters": rope}
    tower = {"num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    tiles = {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    return hf.MllamaConfig(text_config=text, vision_config=_VISION | tower | tiles, image_token_index=300)


def _llava(kind: str, text: str, vision: str, **options: Any) -> Callable[[], hf.PretrainedConfig]:
    """Returns a function that makes a config of one of the wrappers that take any text model and any tower."""
    parts = {"text_config": _TEXT | {"model_type": text}, "vision_config": _VISION | {"model_type": vision}}
    return lambda: hf.CONFIG_MAPPING[kind](**(parts | options))


def _qwen_vl(kind: str, vision: dict[str, Any], **text: Any) -> Callable[[], hf.PretrainedConfig]:
    tokens = {"image_token_id": 300, "video_token_id": 301}
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64} | vision
    section = _TEXT | {"rope_parameters": _AXES} | text
    return lambda: hf.CONFIG_MAPPING[kind](text_config=section, vision_config=tower, **tokens)


def _partial(section: list[int]) -> dict[str, Any]:
    return {"rope_parameters": _AXES | {"mrope_section": section, "partial_rotary_factor": 0.5}}


def _gemma4() -> hf.PretrainedConfig:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    sizes = {"global_head_dim": 16, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 64}
    text = _TEXT | sizes | {"num_kv_shared_layers": 0, "sliding_window": 8, "layer_types": kinds}
    tower = _VISION | {"head_dim": 8, "num_key_value_heads": 4}
    return hf.CONFIG_MAPPING["gemma4"](text_config=text, vision_config=tower, audio_config=None)


def _llama4() -> hf.PretrainedConfig:
    experts = {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
    tower = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 64}
    text = _TEXT | experts | {"attention_chunk_size": 8}
    return hf.Llama4Config(text_config=text, vision_config=_VISION | tower, image_token_index=300)


_SWEEP: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen2_vl": _qwen_vl("qwen2_vl", {"embed_dim": 32, "hidden_size": 64}),
    "qwen3_vl": _qwen_vl("qwen3_vl", {"deepstack_visual_indexes": [0]}),
    "glm4v": _qwen_vl("glm4v", {}, **_partial([2, 1, 1])),
    "qwen3_5": _qwen_vl(
        "qwen3_5", {}, layer_types=["linear_attention"] * 2 + ["full_attention"], **_partial([2, 1, 1])
    ),
    "llava": _llava("llava", "llama", "clip_vision_model", image_token_index=300),
    "internvl": _llava("internvl", "qwen2", "internvl_vision", image_token_id=300),
    "aya_vision": _llava("aya_vision", "cohere2", "siglip_vision_model", image_token_index=300),
    "idefics3": _llava("idefics3", "llama", "idefics3_vision", image_token_id=300, scale_factor=2, pad_token_id=0),
    "smolvlm": _llava("smolvlm", "llama", "smolvlm_vision", image_token_id=300, scale_factor=2, pad_token_id=0),
    "gemma4": _gemma4,
    "llama4": _llama4,
}

#: Names on disk as in memory (Gemma 3 and Mistral 3 are renamed), several rope axes, layers that only images use.
WRAPPERS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "mllama": _mllama,
}
_LENGTHS = (13, 5, 21)


def publish(kind: str, folder: Path, tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    """Writes the checkpoint of a random multimodal model, as transformers publishes it."""
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    torch.manual_seed(0)
    whole: Any = hf.AutoModelForImageTextToText.from_config((WRAPPERS | _SWEEP)[kind](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*WRAPPERS, *(pytest.param(kind, marks=pytest.mark.sweep) for kind in _SWEEP)])
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_factory: Callable[..., hf.PreTrainedTokenizerFast],
) -> Path:
    return publish(request.param, tmp_path_factory.mktemp(request.param), tokenizer_factory(eos="<|im_end|>"))


def load(folder: Path, base: BaseConfig | None = None) -> Any:
    return models.load_model(ModelConfig(id=str(folder), dtype="float32"), base or NoBase())


def published(folder: Path) -> Any:
    return hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def documents() -> list[Tensor]:
    return [torch.randint(3, 290, (n,), generator=torch.Generator().manual_seed(n)) for n in _LENGTHS]


def packed_logits(model: Any) -> Tensor:
    texts = documents()
    positions = torch.cat([torch.arange(len(each)) for each in texts])
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32)
    hidden = forward_packed(model, torch.cat(texts)[None], positions[None], bounds)
    return models.head(model).logits(hidden)[0]


@torch.no_grad()
def logits_alone(model: Any) -> Tensor:
    return torch.cat([model(input_ids=each[None], use_cache=False).logits[0] for each in documents()])


def test_towers_are_neither_built_nor_read(folder: Path) -> None:
    model = load(folder)
    whole = build_wrapper(model.config, torch.float32)
    names, all_names = set(dict(model.named_parameters())), set(dict(whole.named_parameters()))
    assert names < all_names, "names are those of the published model"
    assert not [name for name in names if "vision" in name or "visual" in name or "projector" in name]
    assert not [name for name in names if "layers.1.cross_attn" in name], "a layer that text skips"
    read = {entry.name for entry in WeightStream(ModelConfig(id=str(folder)), NoBase(), torch.float32).entries}
    assert read == set(model.state_dict()) - {"lm_head.weight"} | (read & {"lm_head.weight"})


def test_packed_text_has_the_logits_of_the_whole_model(folder: Path) -> None:
    theirs = logits_alone(published(folder))
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(load(folder)), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("format", ["none", "nf4"])
def test_peft_attaches_a_trained_adapter_to_the_whole_model(folder: Path, tmp_path: Path, format: str) -> None:
    base = base_section(format)
    model = load(folder, base)
    adapter = LoraAdapter(rank=4, alpha=8)
    adapters.attach(model, adapter, seed=0)
    trained = [parameter for _, parameter in adapters.trainable_parameters(model)]
    optimizer = torch.optim.SGD(trained, 0.5)
    nn.functional.cross_entropy(packed_logits(model)[:-1], torch.cat(documents())[1:]).backward()
    assert all(parameter.grad is not None for parameter in trained), "an adapted layer that text does not use"
    optimizer.step()
    adapters.save_adapter(model, tmp_path, adapter, str(folder))
    whole = published(folder)
    _take_quantized(whole, model)
    before = logits_alone(whole)
    attached: Any = peft.PeftModel.from_pretrained(whole, tmp_path).eval()
    adapted = [name for name, _ in attached.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == len(adapters.lora_modules(model)), "and none in a tower"
    theirs = logits_alone(attached)
    assert (theirs - before).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(model), theirs, rtol=1e-3, atol=1e-4)


def _take_quantized(whole: nn.Module, model: nn.Module) -> None:
    """Gives a model of transformers the weights that a quantized one computes with."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            path = name.removesuffix(".base")
            whole.get_submodule(path).weight.data = module.decode(torch.float32)  # type: ignore[union-attr]
        elif isinstance(module, QuantStack):
            experts = torch.stack([module.decode(each, torch.float32) for each in range(module.num_stacked or 0)])
            whole.get_parameter(name).data = experts.transpose(1, 2) if module.transposed else experts


def test_full_fine_tuning_saves_the_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    section = ModelConfig(id=str(folder), dtype="float32")
    model = models.load_model(section)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.01 * ("o_proj" in name))
    models.save_pretrained(model, models.load_tokenizer(section), tmp_path / "out", section)
    whole = _read_whole(tmp_path / "out")
    _require_towers_of(folder, tmp_path / "out", model)
    with torch.no_grad():
        torch.testing.assert_close(logits_alone(whole), packed_logits(model), rtol=1e-4, atol=1e-5)


def test_training_from_random_weights_saves_towers_too(tmp_path: Path, folder: Path) -> None:
    section = ModelConfig(id=str(folder), dtype="float32", init="random")
    model = models.load_model(section)
    models.save_pretrained(model, models.load_tokenizer(section), tmp_path / "out", section)
    whole = _read_whole(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits_alone(whole), packed_logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("type_name", ["f32", "nf4"])
def test_a_merged_export_copies_the_towers(folder: Path, tmp_path: Path, type_name: str) -> None:
    section = ModelConfig(id=str(folder), dtype="float32")
    model = models.load_model(section)
    adapter = LoraAdapter(rank=4)
    adapters.attach(model, adapter, seed=0)
    with torch.no_grad():
        for layer in adapters.lora_modules(model).values():
            layer.lora_b.normal_(0, 0.1)
    adapters.save_adapter(model, tmp_path / "adapter", adapter, str(folder), identity=adapters.identify(model))
    merged = MergedModel(Source(section, NoBase(), tmp_path / "adapter"))
    out = tmp_path / "out"
    out.mkdir()
    layout, tokenizer = choose_layout(type_name, NoBase()), models.load_tokenizer(section)
    if type_name == "nf4" and any(map(is_experts, merged.stream.model.modules())):
        with pytest.raises(QuantizationError, match="no layout for fused experts"):
            write_safetensors(merged, tokenizer, section, out, layout)
        return
    write_safetensors(merged, tokenizer, section, out, layout)
    whole = _read_whole(out)
    _require_towers_of(folder, out, load(folder))
    close = {"rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        theirs = logits_alone(whole)
        if type_name == "f32":
            torch.testing.assert_close(theirs, packed_logits(model), **close)
        again = load(out, base_section("none" if type_name == "f32" else "nf4"))
        torch.testing.assert_close(theirs.float(), packed_logits(again), rtol=0.1, atol=0.25)


def _read_whole(folder: Path) -> Any:
    """Reads a complete model with transformers, which must find every weight and use every one."""
    whole, info = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return whole.eval()


def _require_towers_of(folder: Path, written: Path, text: nn.Module) -> None:
    """Compares what is no part of the text model with the published files, and the files of the processor."""
    theirs, ours = published(folder).state_dict(), _read_whole(written).state_dict()
    towers = theirs.keys() - text.state_dict().keys()
    assert len(towers) > 10 and towers <= ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in towers)
    config = "preprocessor_config.json"
    assert (written / config).read_bytes() == (folder / config).read_bytes()


def test_the_tower_of_a_package_that_is_not_installed_is_left_alone(tmp_path: Path) -> None:
    """Gemma 3n: its tower needs timm, so transformers cannot build the whole model here."""
    text = shrink(hf.Gemma3nTextConfig(), Size(width=32, layers=4, vocab_size=128, positions=64))
    torch.manual_seed(0)
    alone: Any = hf.AutoModelForCausalLM.from_config(text, dtype=torch.float32).eval()
    enliven(alone)
    config = hf.Gemma3nConfig(text_config=text.to_dict())
    config.save_pretrained(tmp_path)
    tensors = {f"model.language_model.{name}": each for name, each in alone.model.state_dict().items()}
    parts = build_text_part(config, torch.float32).state_dict()
    tensors |= {name: torch.randn(each.shape) for name, each in parts.items() if name.startswith("model.embed_")}
    tower = {"model.vision_tower.timm_model.conv_stem.weight": torch.ones(2, 2)}
    save_file(tensors | tower, tmp_path / "model.safetensors")
    told: list[Event] = []
    model = models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), sink=told.append)
    assert not [event for event in told if isinstance(event, Warned)]
    ids = torch.tensor([[3, 17, 5, 99, 41, 7]])
    positions, bounds = torch.tensor([[0, 1, 2, 3, 0, 1]]), torch.tensor([0, 4, 6], dtype=torch.int32)
    with torch.no_grad():
        logits = models.head(model).logits(forward_packed(model, ids, positions, bounds))[0]
        theirs = [alone(input_ids=part, use_cache=False).logits[0] for part in ids.split([4, 2], dim=1)]
    torch.testing.assert_close(logits, torch.cat(theirs), rtol=1e-4, atol=1e-5)
    assert stored_towers(ModelConfig(id=str(tmp_path)), model.config).keys() >= tower.keys()
