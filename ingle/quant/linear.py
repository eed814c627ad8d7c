"""Modules with quantized weights: linear layers, embeddings, and the base class of stacked experts.

Legend: O = out_features, I = in_features, V = vocabulary, H = hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ingle.errors import QuantizationError
from ingle.quant.format import Format
from ingle.quant.plane import align


class QuantModule(nn.Module):
    """A weight ``[O, I]``, or a stack of weights, stored as planes.

    Every plane is a frozen ``nn.Parameter`` of an integer dtype, so that FSDP shards it, safetensors stores it and no
    cast changes it.

    Args:
        format: Format of the planes.
        out_features: O.
        in_features: I.
        num_stacked: Number of weights stacked along a new first dimension of every plane; None for a single weight.
        transposed: Whether the checkpoint stores the weight as ``[I, O]`` (GPT-2's Conv1D).
        weight_dtype: Dtype of the weight in the checkpoint. Embeddings return it, and biases are created in it.
        device: Device of the planes; ``meta`` until they are filled.
    """

    def __init__(
        self,
        format: Format,
        out_features: int,
        in_features: int,
        *,
        num_stacked: int | None = None,
        transposed: bool = False,
        weight_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self.out_features = out_features
        self.in_features = in_features
        self.num_stacked = num_stacked
        self.transposed = transposed
        self.weight_dtype = weight_dtype
        stack = () if num_stacked is None else (num_stacked,)
        self.specs = format.plane_specs(out_features, in_features)
        for name, spec in self.specs.items():
            plane = torch.empty(stack + spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(plane, requires_grad=False))

    @property
    def num_weights(self) -> int:
        """Number of logical weights, independent of the bytes they take."""
        return (self.num_stacked or 1) * self.out_features * self.in_features

    def planes(self) -> dict[str, Tensor]:
        """Returns the planes by name, with all stacked weights."""
        return {name: self.get_parameter(name) for name in self.specs}

    def assign(self, planes: Mapping[str, Tensor]) -> None:
        """Uses the given planes without encoding; copies a plane only if its address is not aligned.

        Raises:
            QuantizationError: A plane is missing or unknown, or has the wrong shape or dtype.
        """
        own = self.planes()
        if set(planes) != set(own):
            raise QuantizationError(
                f"The planes do not match the format {self.format.name}.",
                why=f"expected {sorted(own)}, got {sorted(planes)}",
            )
        for name, plane in planes.items():
            if plane.shape != own[name].shape or plane.dtype != own[name].dtype:
                raise QuantizationError(
                    f"Plane {name!r} does not match the format {self.format.name}.",
                    why=f"expected {tuple(own[name].shape)} {own[name].dtype}, got {tuple(plane.shape)} {plane.dtype}",
                )
            self.register_parameter(name, nn.Parameter(align(plane.detach()), requires_grad=False))

    def quantize(self, weight: Tensor, *, name: str = "weight", importance: Tensor | None = None) -> None:
        """Quantizes a weight and stores its planes, on the device of the weight.

        Args:
            weight: ``[O, I]``; ``[I, O]`` if ``transposed``; with a leading dimension if stacked.
            name: The weight's name for errors.
            importance: ``[I]``, see :meth:`Format.encode`.

        Raises:
            QuantizationError: The weight has the wrong shape, or cannot be encoded.
        """
        stack = () if self.num_stacked is None else (self.num_stacked,)
        if self.transposed:
            weight = weight.transpose(-1, -2)
        if tuple(weight.shape) != (*stack, self.out_features, self.in_features):
            raise QuantizationError(
                f"The shape of {name} does not match its layer.",
                where=name,
                why=f"expected {[*stack, self.out_features, self.in_features]}, got {list(weight.shape)}",
            )
        if self.num_stacked is None:
            self.assign(self.format.encode(weight, importance, name=name))
            return
        parts = [self.format.encode(part, importance, name=f"{name}[{i}]") for i, part in enumerate(weight)]
        self.assign({plane: torch.stack([part[plane] for part in parts]) for plane in self.specs})

    def extra_repr(self) -> str:
        """Returns what ``print(model)`` shows."""
        stacked = "" if self.num_stacked is None else f"num_stacked={self.num_stacked}, "
        bits = self.format.bits_per_weight(self.out_features, self.in_features)
        return (
            f"{stacked}in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.format.name}, bits_per_weight={bits:.3f}"
        )


class QuantLinear(QuantModule):
    """``x W^T + bias`` with a quantized W, which is decoded for the product and again for the gradient.

    Args:
        format: Format of the planes.
        in_features: I.
        out_features: O.
        bias: Whether there is a bias, an ordinary parameter.
        transposed: See :class:`QuantModule`.
        weight_dtype: See :class:`QuantModule`.
        device: See :class:`QuantModule`.

    Attributes:
        weight: None; layers of T5 ask whether the weight is a tensor before they convert their input to its dtype.
    """

    weight = None

    def __init__(
        self,
        format: Format,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        transposed: bool = False,
        weight_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            format, out_features, in_features, transposed=transposed, weight_dtype=weight_dtype, device=device
        )
        self.bias = nn.Parameter(torch.empty(out_features, dtype=weight_dtype, device=device)) if bias else None

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Returns the weight ``[O, I]`` in a new tensor or in ``out``.

        Pass ``out=layer.scratch(dtype)`` if the result is used before another layer decodes.
        """
        return self.format.decode(self.planes(), self.out_features, self.in_features, dtype, out)

    def multiply(self, x: Tensor) -> Tensor | None:
        """Returns ``x W^T`` without storing W, or None where that is not faster, see :meth:`Format.multiply`."""
        return self.format.multiply(self.planes(), x, self.out_features, self.in_features)

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """Returns the format's shared buffer in the shape of this layer; valid until another layer takes it."""
        device = self.get_parameter(next(iter(self.specs))).device
        return self.format.scratch.take((self.out_features, self.in_features), dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        return quant_linear(x, self.format, self.out_features, self.in_features, self.planes(), self.bias)


class QuantEmbedding(QuantModule):
    """An embedding ``[V, H]`` that decodes rows when they are looked up.

    Args:
        original: The embedding to replace; ``embed_scale``, if it has one, is kept.
        format: Format of the planes.
    """

    def __init__(self, original: nn.Embedding, format: Format) -> None:
        weight = original.weight
        super().__init__(format, *weight.shape, weight_dtype=weight.dtype, device=weight.device)
        self.register_buffer("embed_scale", getattr(original, "embed_scale", None), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., H]`` in ``weight_dtype``."""
        rows = ids.reshape(-1)
        planes = {name: plane[rows] for name, plane in self.planes().items()}
        decoded = self.format.decode(planes, len(rows), self.in_features, self.weight_dtype)
        scale: Tensor | None = self._buffers["embed_scale"]
        scaled = decoded if scale is None else decoded * scale.to(self.weight_dtype)
        return scaled.view(*ids.shape, self.in_features)


def quant_linear(
    x: Tensor,
    format: Format,
    out_features: int,
    in_features: int,
    planes: Mapping[str, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """Computes ``x W^T + bias``; autograd saves the planes only, never the decoded weight.

    Args:
        x: ``[..., I]``.
        format: Format of the planes.
        out_features: O.
        in_features: I.
        planes: As ``format.plane_specs`` lists them.
        bias: ``[O]`` or None.

    Returns:
        ``[..., O]`` in the dtype of ``x``.
    """
    shape = (out_features, in_features)
    result: Tensor = _QuantLinear.apply(x, bias, format, shape, tuple(planes), *planes.values())  # type: ignore[no-untyped-call]
    return result


def decode_to_scratch(format: Format, planes: Mapping[str, Tensor], shape: tuple[int, int], like: Tensor) -> Tensor:
    """Decodes a weight into the format's scratch buffer, in the dtype and on the device of ``like``."""
    out = format.scratch.take(shape, like.dtype, like.device)
    return format.decode(planes, *shape, like.dtype, out)


class _QuantLinear(torch.autograd.Function):
    """Saves planes, and decodes in forward and again in backward; planes get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        format: Format,
        shape: tuple[int, int],
        names: tuple[str, ...],
        *planes: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*planes)
        ctx.format, ctx.shape, ctx.names = format, shape, names
        ctx.bias_dtype = None if bias is None else bias.dtype
        named, bias = dict(zip(names, planes, strict=True)), None if bias is None else bias.to(x.dtype)
        product = format.multiply(named, x, *shape)
        if product is None:
            return functional.linear(x, decode_to_scratch(format, named, shape, x), bias)
        return product if bias is None else product.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        planes = ctx.saved_tensors  # read only once: under activation recomputation, a second access fails
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            named = dict(zip(ctx.names, planes, strict=True))
            grad_x = grad.matmul(decode_to_scratch(ctx.format, named, ctx.shape, grad))
        if ctx.needs_input_grad[1]:
            sum_dtype = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=sum_dtype).to(ctx.bias_dtype)
        return (grad_x, grad_bias, None, None, None, *(None for _ in planes))
