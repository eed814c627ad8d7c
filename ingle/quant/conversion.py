"""Replaces the linear layers of a model by quantized ones, before or after weights are loaded.

Quantized: every ``nn.Linear`` and ``Conv1D`` except the output head and the head of a task, and fused experts.
Embedding and output head are converted separately by :func:`quantize_ends`. Norms, convolutions, routers and biases
stay in the compute dtype. A model of which a large part is in other modules is an error.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ingle.config.base import BaseConfig, TernaryBase
from ingle.errors import QuantizationError
from ingle.quant.catalog import Formats, make_formats
from ingle.quant.experts import QuantExperts, is_experts, projection_shapes, quantize_experts
from ingle.quant.format import Format
from ingle.quant.linear import QuantEmbedding, QuantLinear, QuantModule
from ingle.quant.straight_through import TernaryLinear
from ingle.quant.task_heads import is_in_head
from ingle.quant.ternary import Ternary

#: Modules whose parameters have three or more dimensions but are not experts.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: The part of a model's weights that may have an unknown layout.
_UNKNOWN_SHARE = 0.25


def convert(model: nn.Module, base: BaseConfig, *, formats: Formats | None = None) -> None:
    """Replaces the linear layers of a model in place by quantized ones, or by ones that train with ternary weights.

    On the meta device planes stay empty until weights are loaded. Otherwise each weight is encoded and freed before
    the next one.

    Args:
        model: Any module. The result of its ``get_output_embeddings``, if any, is left unchanged.
        base: The format; ``none`` changes nothing.
        formats: Chooses the format of each module instead of ``base``.

    Raises:
        QuantizationError: The model has weights in an unsupported module, or a weight cannot be encoded.
    """
    is_trained = isinstance(base, TernaryBase) and base.train
    formats = formats or make_formats(base, model)
    if formats is None:
        return
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    refuse_unknown(model)
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    replacements: dict[int, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        if isinstance(parent, QuantModule | QuantExperts):
            continue
        for key, child in list(parent._modules.items()):  # a module that is used twice is listed twice
            name = f"{parent_name}.{key}" if parent_name else key
            if child is None or child is head or is_in_head(model, name):
                continue
            if id(child) not in replacements:
                replacement = _replace(child, formats, name, uses, is_trained=is_trained)
                if replacement is None:
                    continue
                replacements[id(child)] = replacement
            setattr(parent, key, replacements[id(child)])


def quantize_ends(model: Any, formats: Formats) -> None:
    """Replaces the embedding and the output head of a language model in place by quantized ones.

    A module without a format is not changed, nor is an embedding of an unknown class or a head that is tied to it. Tied
    modules share their planes.

    Args:
        model: On the meta device, with ``get_input_embeddings`` and ``get_output_embeddings``.
        formats: Chooses the format of each module.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    format = formats(names[id(embedding)], *embedding.weight.shape) if _is_supported_embedding(embedding) else None
    quantized = None
    if format is not None:
        quantized = QuantEmbedding(embedding, format)
        model.set_input_embeddings(quantized)
    if type(head) is not nn.Linear or (tied and quantized is None):
        return
    format = format if tied else formats(names[id(head)], *head.weight.shape)
    if format is None:
        return
    linear = make_quant_linear(head, format)
    if tied and quantized is not None:
        for name in linear.specs:
            linear.register_parameter(name, quantized.get_parameter(name))
    model.set_output_embeddings(linear)


def make_quant_linear(linear: nn.Module, format: Format) -> QuantLinear:
    """Returns a layer of the shape, bias, dtype and device of an ``nn.Linear`` or ``Conv1D``, with empty planes."""
    weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
    transposed = is_conv1d(linear)
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    layer = QuantLinear(
        format, in_features, out_features, transposed=transposed, weight_dtype=weight.dtype, device=weight.device
    )
    layer.bias = bias
    return layer.train(linear.training)


def _replace(
    module: nn.Module, formats: Formats, name: str, uses: Counter[int], *, is_trained: bool
) -> nn.Module | None:
    """Returns the replacement of a module, or None if it stays."""
    if is_trained and (is_experts(module) or is_conv1d(module)):
        raise QuantizationError(
            f"{name} ({type(module).__name__}) cannot be trained with ternary weights.",
            where=name,
            why="only plain linear layers can be trained through their rounding",
            fix="--adapter.kind=lora --base.train=false, or another model",
        )
    if is_experts(module):
        chosen = {key: formats(f"{name}.{key}", *shape) for key, shape in projection_shapes(module).items()}
        return quantize_experts(module, chosen, name=name) if any(chosen.values()) else None
    # Subclasses of nn.Linear, such as the one in nn.MultiheadAttention, may be read by their owner in other ways.
    if not (is_conv1d(module) or type(module) is nn.Linear):
        return None
    linear: Any = module
    if uses[id(linear.weight)] > 1:
        return None  # shared with an embedding or another map: quantizing one of them would untie them
    out_features, in_features = linear.weight.shape[::-1] if is_conv1d(module) else linear.weight.shape
    format = formats(name, out_features, in_features)
    if format is None:
        return None
    if is_trained:
        assert isinstance(format, Ternary)
        return TernaryLinear(format, linear)
    replacement = make_quant_linear(linear, format)
    if not linear.weight.is_meta:
        replacement.quantize(linear.weight, name=f"{name}.weight")
        linear.weight = None  # free it now instead of when the model is done
    return replacement


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether a module is transformers' Conv1D (GPT-2), a linear layer that stores its weight as ``[I, O]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_supported_embedding(module: nn.Module) -> bool:
    """Returns whether this is a plain embedding, or Gemma's, which multiplies its rows by a buffer ``embed_scale``."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and set(module._buffers) == {"embed_scale"}
    return type(module) is nn.Embedding or scaled


def refuse_unknown(model: nn.Module) -> None:
    """Rejects a model of which a large part are weights in an unknown layout.

    These are floating-point parameters of three or more dimensions that belong neither to a convolution nor to known
    experts, and matrices of modules whose class name contains "expert". At most :data:`_UNKNOWN_SHARE` of a model,
    such as the gates of a recurrent state, stays in the compute dtype: see :func:`describe_unknown`.

    Raises:
        QuantizationError: Naming the first of them.
    """
    unknown, size, share = _find_unknown(model)
    if share <= _UNKNOWN_SHARE:
        return
    path, parameter = next(iter(unknown.items()))
    name = path.rpartition(".")[0]
    kind = type(model.get_submodule(name)).__name__
    raise QuantizationError(
        f"{name} ({kind}) contains weights in a layout that cannot be quantized yet.",
        where=path,
        why=f"shape {list(parameter.shape)}; {size:,} such weights would stay in {parameter.dtype}",
        fix="train with --base.format=none, or request support for this architecture",
    )


def describe_unknown(model: nn.Module) -> str | None:
    """Returns a sentence on the weights that stay in the compute dtype for their layout; None if there are none.

    Args:
        model: Before it is converted, of any device.
    """
    unknown, size, share = _find_unknown(model)
    if not unknown:
        return None
    kinds = dict.fromkeys(type(model.get_submodule(path.rpartition(".")[0])).__name__ for path in unknown)
    return (
        f"{size:,} weights ({share:.1%} of the model) are not quantized, because {', '.join(kinds)} keeps them in a "
        "layout that cannot be quantized yet."
    )


def _find_unknown(model: nn.Module) -> tuple[dict[str, nn.Parameter], int, float]:
    """Returns the weights in an unknown layout, their number, and their share of the model."""
    unknown = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, (*CONVOLUTIONS, QuantModule, QuantExperts)) and not is_experts(module)
        for key, parameter in module.named_parameters(recurse=False)
        if _is_stacked(module, parameter)
    }
    size = sum(parameter.numel() for parameter in unknown.values())
    return unknown, size, size / max(1, sum(parameter.numel() for parameter in model.parameters()))


def _is_stacked(module: nn.Module, parameter: nn.Parameter) -> bool:
    is_stack = sum(size > 1 for size in parameter.shape) >= 3
    is_expert = parameter.dim() >= 2 and "expert" in type(module).__name__.lower() and not isinstance(module, nn.Linear)
    return parameter.is_floating_point() and (is_stack or is_expert)
