"""Reads the shape of a model for ``ingle plan``: from a config.json, a GGUF header or, last, the built modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingle.config import Run
    from ingle.gguf.names import TensorRule
    from ingle.planning import ModelShape
    from ingle.planning.architecture import Bits

#: Embeddings whose model reads the weight itself, so that they stay plain: of T5 and of Mamba.
_PLAIN_ENDS = ("shared.weight", "backbone.embeddings.weight")


def read_shape(run: Run) -> tuple[ModelShape, list[str]]:
    """Returns the shape of the model, and notes; counts an architecture without arithmetic by building it, slowly."""
    from ingle.config.adapter import LowRankAdapter, NoAdapter
    from ingle.planning.architecture import read_architecture
    from ingle.planning.layouts import layout_note

    bits: Bits | None
    if run.model.id.lower().endswith(".gguf"):
        config, bits, ends = _read_gguf(run)
        origin = "its GGUF file"
    else:
        from ingle.planning.model_files import find_config

        config, origin = find_config(run.model)
        bits, ends = _mix_bits(run, config), None
    notes = [f"The shape of {run.model.id} is from {origin}."]
    found = read_architecture(config)
    if not isinstance(run.adapter, LowRankAdapter | NoAdapter):
        notes.append(f"What adapter.kind = {run.adapter.kind} trains was built and counted.")
        shape, layout = _census(run)
    elif found is None:
        notes.append(f"There is no arithmetic for {config.get('model_type')}: its modules were built and counted.")
        shape, layout = _census(run)
    else:
        shape = replace(found.shape(run.adapter, bits), end_bits_per_weight=ends)
        layout = layout_note(run, shape.model_type)
    return _with_task_head(run, shape), notes if layout is None else [*notes, layout]


def _with_task_head(run: Run, shape: ModelShape) -> ModelShape:
    """Returns the shape of a model that scores or labels in the place of predicting tokens, if the objective does.

    Labels that are read from the data are taken as two.
    """
    from ingle.config.objective import Answer, Classify, Tag
    from ingle.config.preferences import Reward

    match run.objective:
        case Reward():
            outputs = 1
        case Classify(labels=labels) | Tag(labels=labels):
            outputs = len(labels or (0, 1))
        case Answer():
            outputs = 2
        case _:
            return shape
    head = shape.hidden_size * outputs
    return replace(
        shape,
        vocab_size=outputs,
        head_parameters=0,
        tied=False,
        final_parameters=shape.final_parameters + head,
        saved_parameters=shape.saved_parameters + head,
    )


def _census(run: Run) -> tuple[ModelShape, str | None]:
    """Returns the shape of a model, and a sentence on its layout, by building its modules without weights."""
    import torch

    from ingle import adapters, models
    from ingle.training.model_shape import model_shape

    model = models.meta_model(run.model, "cpu", torch.bfloat16)
    formats = models.choose_formats(model, run.model, run.base)
    shape = model_shape(model, adapters.select(model, run.adapter), formats)
    shape = replace(shape, adapter_parameters=adapters.count_parameters(model, run.adapter))
    return shape, models.layout_note(model)


def _read_gguf(run: Run) -> tuple[Mapping[str, Any], Bits, float | None]:
    """Returns the settings of a GGUF file, the bits of each module, and those of its embedding."""
    from ingle.gguf import read_gguf
    from ingle.gguf.architecture import to_config
    from ingle.gguf.names import names_of

    file = read_gguf(run.model.id)
    config = to_config(file)
    names, num_experts = names_of(config), config.get("num_experts") or config.get("num_local_experts") or 1

    def bits(path: str, out_features: int, in_features: int) -> float | None:
        is_stack = ".experts." in path  # a stack of experts is a parameter, and so has no ``weight``
        shape = (num_experts, out_features, in_features) if is_stack else (out_features, in_features)
        rule = names.rule(path if is_stack else f"{path}.weight", shape, file.tensors)
        tensors = [] if rule is None else [file.tensors[name] for name in rule.tensors if name in file.tensors]
        if rule is None or not tensors or any(not keeps_bytes(rule, tensor.type_name) for tensor in tensors):
            return None
        return 8 * sum(tensor.num_bytes for tensor in tensors) / prod(shape)

    def keeps_bytes(rule: TensorRule, type_name: str) -> bool:
        return type_name not in ("f32", "f16", "bf16") and rule.moves_bytes(type_name)

    path, embedding = names.to_hf("token_embd.weight"), file.tensors.get("token_embd.weight")
    if path is None or embedding is None or path in _PLAIN_ENDS:
        return config, bits, None
    return config, bits, bits(path.removesuffix(".weight"), *embedding.shape)


def _mix_bits(run: Run, config: Mapping[str, Any]) -> Bits | None:
    """Returns the bits of each module for a mix of GGUF formats; None for other formats."""
    from ingle.config.ggml import MixBase

    if not isinstance(run.base, MixBase):
        return None
    from ingle.gguf.container import block_of
    from ingle.gguf.families import BY_MODEL_TYPE
    from ingle.gguf.mixes import mix_of_config
    from ingle.gguf.names import names_of

    if str(config.get("model_type")) not in BY_MODEL_TYPE:
        return None
    names, mix = names_of(config), mix_of_config(run.base.format, config)

    def bits(path: str, out_features: int, in_features: int) -> float | None:
        tensors = names.tensors(f"{path}.weight") or names.tensors(path) or (f"{path}.weight",)
        size, num_bytes = block_of(mix.tensor_type(tensors[0], (out_features, in_features)))
        return 8 * num_bytes / size

    return bits
