"""Every private interface of transformers and torch that Ingle uses, with a check that names it when it changes.

The table is the list of them.  A failing check means that a new version changed something without notice: follow the
advice of its row, or cap the version in ``pyproject.toml`` until that is done.  The interfaces of numba are listed with
the tests of the kernels.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import conversion_mapping, core_model_loading, masking_utils, modeling_utils

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def build(config: hf.PretrainedConfig, **options: Any) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config, **options)


def llama(**options: Any) -> Any:
    return build(hf.LlamaConfig(**TINY, **options))


def mixtral() -> Any:
    return build(hf.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=2))


def takes(function: Callable[..., Any], *names: str) -> bool:
    return set(names) <= inspect.signature(function).parameters.keys()


def converters_fuse_experts() -> bool:
    transforms = conversion_mapping.get_model_conversion_mapping(mixtral())
    converters = [each for each in transforms if isinstance(each, core_model_loading.WeightConverter)]
    gate_up = next(each for each in converters if len(each.source_patterns) == 2)
    steps = [(type(step).__name__, step.dim) for step in gate_up.operations]
    return steps == [("MergeModulelist", 0), ("Concatenate", 1)]


def names_are_renamed_as_on_the_hub() -> bool:
    model = mixtral()
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    kinds = (core_model_loading.WeightRenaming, core_model_loading.WeightConverter)
    renamings, converters = ([each for each in transforms if isinstance(each, kind)] for kind in kinds)
    name, pattern = core_model_loading.rename_source_key(
        "model.layers.0.block_sparse_moe.experts.1.w2.weight", renamings, converters, "model", model.state_dict()
    )
    return name == "model.layers.0.mlp.experts.down_proj" and pattern is not None


def unread_tensors_are_called() -> bool:
    converter = core_model_loading.WeightConverter(
        source_patterns="a.*.w", target_patterns="w", operations=[core_model_loading.MergeModulelist(dim=0)]
    )
    for value in (1.0, 2.0):
        converter.add_tensor("w", "a.*.w", "a.*.w", lambda value=value: torch.full((1,), value))
    (found,) = converter.convert("w", model=llama(), config=hf.LlamaConfig(**TINY)).values()
    return torch.equal(found[0] if isinstance(found, list) else found, torch.tensor([[1.0], [2.0]]))


def initialised_parameters_are_left_alone() -> bool:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY))
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    kept = torch.equal(weight, before)
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    return kept and not torch.equal(weight, before)


def attention_gets_boundaries_and_mask() -> bool:
    seen: dict[str, Any] = {}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **named: Any) -> Any:
        seen.update(named, mask=mask)
        return query.transpose(1, 2), None

    hf.AttentionInterface.register("ingle_test", attend)
    hf.AttentionMaskInterface.register("ingle_test", masking_utils.sdpa_mask)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY))
    model.set_attn_implementation("ingle_test")
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    model.model(torch.ones(1, 3, dtype=torch.long), attention_mask=mask, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    return (
        model.config._attn_implementation == "ingle_test" and seen["mask"] is mask and seen["cu_seq_lens_q"] is bounds
    )


def caches_hold_keys_and_values() -> bool:
    cache = hf.DynamicCache(config=hf.LlamaConfig(**TINY))
    cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    cache.batch_select_indices(torch.tensor([0, 2]))
    return len(cache.layers[0].keys) == len(cache.layers[0].values) == 2


def rotary_modules_name_their_type() -> bool:
    settings = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = llama(rope_parameters=settings, max_position_embeddings=20)
    rotary = model.model.rotary_emb
    return (
        rotary.rope_type == "dynamic"
        and rotary.original_max_seq_len == 20
        and rotary.config.rope_parameters == settings
    )


def experts_have_a_gate() -> bool:
    experts = mixtral().model.layers[0].mlp.experts
    marks = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    return all(hasattr(experts, mark) for mark in marks) and experts.gate_up_proj.dim() == 3


def routers_are_recorded() -> bool:
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    recorder = module.MixtralModel._can_record_outputs["router_logits"]
    return recorder.target_class is module.MixtralTopKRouter and hasattr(module, "load_balancing_loss_func")


def wrappers_name_their_text_part() -> bool:
    text = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = hf.Gemma3Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model: Any = hf.Gemma3ForConditionalGeneration._from_config(config)
    experts = importlib.import_module("transformers.models.llama4.modeling_llama4").Llama4TextExperts
    return (
        "text_config" in config.sub_configs
        and model.get_decoder() is model.model.language_model
        and takes(experts.forward, "hidden_states")
    )


def classes_have_their_names() -> bool:
    falcon = importlib.import_module("transformers.models.falcon.modeling_falcon")
    gemma = importlib.import_module("transformers.models.gemma3.modeling_gemma3")
    conv1d = hf.pytorch_utils.Conv1D(2, 3)
    plain = inspect.getsource(falcon.FalconLinear.forward)
    scaled = gemma.Gemma3TextScaledWordEmbedding(4, 2, 0)
    families = (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    layers = [
        hasattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), f"{name}DecoderLayer")
        for folder, name in families
    ]
    return all(layers) and conv1d.nf == 2 and "@ self.weight.T" in plain and set(scaled._buffers) == {"embed_scale"}


def fake_tensors_are_known() -> bool:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        return isinstance(torch.empty(1), FakeTensor)


MODEL = modeling_utils.PreTrainedModel

#: What is used, by whom, its check, and what to do when the check fails.
INTERFACES: list[tuple[str, str, Callable[[], bool], str]] = [
    (
        "transformers.core_model_loading.WeightConverter.operations (MergeModulelist, Concatenate)",
        "models/loading/reading_plan.py",
        converters_fuse_experts,
        "adapt _stacked to the new steps; until then experts are converted all at once, in more memory",
    ),
    (
        "transformers.core_model_loading.rename_source_key, transformers.conversion_mapping",
        "models/loading/reading_plan.py",
        names_are_renamed_as_on_the_hub,
        "adapt _NameMapping to the new tables of renamed weights",
    ),
    (
        "transformers.core_model_loading.WeightConverter.add_tensor and convert",
        "models/loading/reading_plan.py, weight_loading.py",
        unread_tensors_are_called,
        "adapt _deferred and _convert: add_tensor must take a function that reads the tensor",
    ),
    (
        "transformers.core_model_loading.dot_natural_key",
        "models/loading/reading_plan.py",
        lambda: sorted(["a.10.b", "a.9.b"], key=core_model_loading.dot_natural_key) == ["a.9.b", "a.10.b"],
        "sort keys with numbers as numbers by an own function",
    ),
    (
        "_is_hf_initialized, PreTrainedModel.initialize_weights",
        "models/loading/meta_device.py",
        initialised_parameters_are_left_alone,
        "find the new mark of initialised parameters for compute_rest",
    ),
    (
        "PreTrainedModel._keep_in_fp32_modules_strict",
        "models/loading/meta_device.py",
        lambda: hasattr(MODEL, "_keep_in_fp32_modules_strict") and not llama()._keep_in_fp32_modules_strict,
        "find the new list of parameters that stay in float32 for _keep_in_float32",
    ),
    (
        "PreTrainedModel._supports_attention_backend and _is_stateful",
        "models/loading/meta_device.py",
        lambda: hf.LlamaForCausalLM._supports_attention_backend and hf.MambaForCausalLM._is_stateful,
        "find the new marks of models that use the attention registry, and of stateful ones",
    ),
    (
        "PreTrainedModel._keys_to_ignore_on_load_missing and _keys_to_ignore_on_load_unexpected",
        "models/loading/reading_plan.py, weight_loading.py",
        lambda: (
            hasattr(MODEL, "_keys_to_ignore_on_load_missing") and hasattr(MODEL, "_keys_to_ignore_on_load_unexpected")
        ),
        "find the new lists of keys that may be missing or unused",
    ),
    (
        "PreTrainedModel.all_tied_weights_keys",
        "models/loading/weight_writer.py",
        lambda: "lm_head.weight" in llama(tie_word_embeddings=True).all_tied_weights_keys,
        "find the new table of tied weights for _untie, or saved models lose an untied head",
    ),
    (
        "config._attn_implementation, arguments of attention functions, four-dimensional masks passed through",
        "models/forward/attention.py, hidden_states.py",
        attention_gets_boundaries_and_mask,
        "adapt attend and forward_packed: boundaries of documents must reach attention unchanged",
    ),
    (
        "transformers.masking_utils.sdpa_mask",
        "models/forward/attention.py",
        lambda: takes(masking_utils.sdpa_mask, "batch_size", "kv_length", "mask_function"),
        "register another function that makes boolean masks",
    ),
    (
        "DynamicCache.layers[].keys and values, batch_select_indices",
        "models/generation/decoding.py",
        caches_hold_keys_and_values,
        "adapt GrowingBatch.drop and PromptBatch._recompute",
    ),
    (
        "rope_type, original_max_seq_len and config.rope_parameters of rotary modules",
        "models/forward/rotary_by_length.py",
        rotary_modules_name_their_type,
        "adapt _kinds and _length_rule",
    ),
    (
        "attributes of fused experts",
        "quant/experts.py",
        experts_have_a_gate,
        "adapt is_fused_experts and QuantExperts",
    ),
    (
        "_can_record_outputs, load_balancing_loss_func",
        "models/forward/routers.py",
        routers_are_recorded,
        "adapt find_routers",
    ),
    (
        "sub_configs, get_decoder and _from_config of multimodal models; Llama4TextExperts",
        "models/text_part.py, quant/experts.py",
        wrappers_name_their_text_part,
        "adapt text_decoder and for_text_part; EveryTokenExperts",
    ),
    (
        "class names: Conv1D, FalconLinear, ScaledWordEmbedding, DecoderLayer",
        "quant, adapters/fusion.py, models/loading/meta_device.py",
        classes_have_their_names,
        "adapt the names; fused layers and quantized embeddings are skipped without them",
    ),
    (
        "torch._subclasses.fake_tensor.FakeTensor",
        "kernels, quant/plane.py",
        fake_tensors_are_known,
        "find another way to recognise the tensors that torch.compile traces with",
    ),
]


@pytest.mark.parametrize(("what", "where", "check", "advice"), INTERFACES, ids=[row[0] for row in INTERFACES])
def test_a_private_interface_is_as_it_was(what: str, where: str, check: Callable[[], bool], advice: str) -> None:
    why = ""
    try:
        works = check()
    except Exception as error:
        works, why = False, f" ({type(error).__name__}: {error})"
    versions = f"transformers {hf.__version__}, torch {torch.__version__}"
    assert works, f"{what} changed in {versions}{why}. It is used in {where}. To do: {advice}, or cap the version."


def test_a_changed_interface_fails_with_a_sentence() -> None:
    with pytest.raises(AssertionError, match=r"gone changed in transformers .* used in a\.py\. To do: find it"):
        test_a_private_interface_is_as_it_was("gone", "a.py", lambda: bool(hf.gone), "find it")
