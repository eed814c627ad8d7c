"""Turns a model's linear maps into packed ones, before or after there are any weights.

What stays in the compute dtype, and is counted in the audit: embeddings, the output head, norms, convolutions,
routers, and biases.  What is packed: every ``nn.Linear`` and ``Conv1D`` elsewhere, and fused experts.  Anything else
that looks like a large weight is refused by name, never passed over.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ingle.config.base import BaseConfig, TernaryBase
from ingle.errors import QuantizationError
from ingle.quant.experts import QuantExperts, is_fused_experts
from ingle.quant.linear import QuantLinear, QuantModule
from ingle.quant.mixing import Formats, make_formats
from ingle.quant.straight_through import TernaryLinear
from ingle.quant.ternary import Ternary


def convert(model: nn.Module, base: BaseConfig, *, formats: Formats | None = None) -> None:
    """Replaces the model's linear maps by packed ones, or by ones that train through their rounding, in place.

    On the meta device the planes are empty and wait for their bytes; on a materialised model every weight is encoded
    and freed, one after the other.

    Args:
        model: Any module; if it has ``get_output_embeddings``, what that returns is left alone.
        base: The format; ``none`` changes nothing.
        formats: Decides the format of each module in place of ``base``.

    Raises:
        QuantizationError: The model holds weights in a module that Ingle cannot pack, or NaN or infinity in one.
    """
    trained = isinstance(base, TernaryBase) and base.train
    formats = formats or make_formats(base, model)
    if formats is None:
        return
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    packed: dict[int, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        if isinstance(parent, QuantModule | QuantExperts):
            continue
        for key, child in list(parent._modules.items()):  # a module used twice is listed twice
            name = f"{parent_name}.{key}" if parent_name else key
            if child is None or child is head:
                continue
            if id(child) not in packed:
                replacement = _pack(child, formats, name, uses, trained=trained)
                if replacement is None:
                    continue
                packed[id(child)] = replacement
            setattr(parent, key, packed[id(child)])


def _pack(module: nn.Module, formats: Formats, name: str, uses: Counter[int], *, trained: bool) -> nn.Module | None:
    """The stand-in for a module, or None if it is to stay."""
    if trained and (is_fused_experts(module) or is_conv1d(module)):
        raise QuantizationError(
            f"{name} ({type(module).__name__}) cannot be trained with ternary weights.",
            where=name,
            why="only plain linear maps are trained through their rounding",
            fix="--adapter.kind=lora --base.train=false, or another model",
        )
    if is_fused_experts(module):
        format = formats(name, *module.get_parameter("down_proj").shape[1:])
        return None if format is None else QuantExperts(module, format, name=name)
    refuse_unknown(module, name)
    transposed = is_conv1d(module)
    # An exact class: a subclass (in nn.MultiheadAttention, for one) may be read by its owner in other ways.
    if not (transposed or type(module) is nn.Linear):
        return None
    linear: Any = module
    if uses[id(linear.weight)] > 1:
        return None  # shared with an embedding or another map: packing one end would untie it
    in_features, out_features = linear.weight.shape if transposed else linear.weight.shape[::-1]
    format = formats(name, out_features, in_features)
    if format is None:
        return None
    if trained:
        assert isinstance(format, Ternary)
        return TernaryLinear(format, linear)
    replacement = QuantLinear(
        format,
        in_features,
        out_features,
        bias=linear.bias is not None,
        transposed=transposed,
        weight_dtype=linear.weight.dtype,
        device=linear.weight.device,
    )
    replacement.bias = linear.bias
    if not linear.weight.is_meta:
        replacement.quantize(linear.weight, name=f"{name}.weight")
        linear.weight = None  # freed now, not when the whole model is done
    replacement.train(module.training)
    return replacement


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2): a linear map whose weight is stored ``[I, O]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def refuse_unknown(module: nn.Module, name: str) -> None:
    """Raises for a module that holds weights of experts in a layout Ingle does not know.

    Raises:
        QuantizationError: It has floating parameters of three or more dimensions and is no convolution, or is called
            experts and has floating matrices.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    kind = type(module).__name__
    for key, parameter in module.named_parameters(recurse=False):
        stacked = sum(size > 1 for size in parameter.shape) >= 3
        matrix = parameter.dim() >= 2 and "expert" in kind.lower() and not isinstance(module, nn.Linear)
        if parameter.is_floating_point() and (stacked or matrix):
            raise QuantizationError(
                f"{name} ({kind}) holds weights in a layout that cannot be packed yet.",
                where=f"{name}.{key}",
                why=f"shape {list(parameter.shape)}, {parameter.numel():,} weights would stay in {parameter.dtype}",
                fix="train with --base.format=none, or ask for this architecture",
            )
