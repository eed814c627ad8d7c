"""Modules that hold a packed weight: the linear map and what it shares with stacks of experts.

Legend: O = out_features, I = in_features.
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
    """A weight ``[O, I]``, or a stack of them, held as planes.

    Every plane is a frozen ``nn.Parameter`` of an integer dtype under its own name, so that FSDP shards it,
    safetensors holds it and no cast touches it.

    Args:
        format: What the planes mean.
        out_features: O.
        in_features: I.
        num_stacked: Weights stacked along a new first dimension of every plane; None for a single one.
        transposed: The checkpoint holds the weight as ``[I, O]`` (GPT-2's Conv1D); ``quantize`` turns it.
        weight_dtype: What the checkpoint's weight is held in before packing; documentation, never a cast.
        device: Where the planes live; ``meta`` until they are filled.
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
        """Logical weights, however many bytes they take."""
        return (self.num_stacked or 1) * self.out_features * self.in_features

    def planes(self) -> dict[str, Tensor]:
        """The planes under their names; with a stack, all of it."""
        return {name: self.get_parameter(name) for name in self.specs}

    def assign(self, planes: Mapping[str, Tensor]) -> None:
        """Takes packed planes as they are; copied only where a mapped file holds them at an odd address.

        Raises:
            QuantizationError: A plane is missing, unknown, or of another shape or dtype.
        """
        own = self.planes()
        if set(planes) != set(own):
            raise QuantizationError(
                f"These planes do not fit {self.format.name}.", why=f"need {sorted(own)}, got {sorted(planes)}"
            )
        for name, plane in planes.items():
            if plane.shape != own[name].shape or plane.dtype != own[name].dtype:
                raise QuantizationError(
                    f"Plane {name!r} does not fit {self.format.name}.",
                    why=f"need {tuple(own[name].shape)} {own[name].dtype}, got {tuple(plane.shape)} {plane.dtype}",
                )
            self.register_parameter(name, nn.Parameter(align(plane.detach()), requires_grad=False))

    def quantize(self, weight: Tensor, *, name: str = "weight", importance: Tensor | None = None) -> None:
        """Packs the checkpoint's weight (``[O, I]``; ``[I, O]`` if ``transposed``; a leading dimension if stacked).

        The planes end up on the weight's device.

        Raises:
            QuantizationError: The weight holds NaN or infinity or is of another shape.
        """
        stack = () if self.num_stacked is None else (self.num_stacked,)
        if self.transposed:
            weight = weight.transpose(-1, -2)
        if tuple(weight.shape) != (*stack, self.out_features, self.in_features):
            raise QuantizationError(
                f"{name} has another shape than its layer.",
                where=name,
                why=f"need {[*stack, self.out_features, self.in_features]}, got {list(weight.shape)}",
            )
        if self.num_stacked is None:
            self.assign(self.format.encode(weight, importance, name=name))
            return
        packed = [self.format.encode(part, importance, name=f"{name}[{i}]") for i, part in enumerate(weight)]
        self.assign({plane: torch.stack([part[plane] for part in packed]) for plane in self.specs})

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        stacked = "" if self.num_stacked is None else f"num_stacked={self.num_stacked}, "
        bits = self.format.bits_per_weight(self.out_features, self.in_features)
        return (
            f"{stacked}in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.format.name}, bits_per_weight={bits:.3f}"
        )


class QuantLinear(QuantModule):
    """``x W^T + bias`` over a packed W: decoded into a scratch for the product, and again for the gradient.

    Args:
        format: What the planes mean.
        in_features: I.
        out_features: O.
        bias: Whether there is a bias; it is an ordinary parameter.
        transposed: The checkpoint holds the weight as ``[I, O]`` (GPT-2's Conv1D).
        weight_dtype: What the checkpoint's weight is held in; the bias too.
        device: Where the planes live; ``meta`` until they are filled.
    """

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
        """The weight ``[O, I]``; a new tensor, or ``out``.

        Pass ``out=layer.scratch(dtype)`` where the result is consumed before the next decode.
        """
        return self.format.decode(self.planes(), self.out_features, self.in_features, dtype, out)

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """The format's shared buffer in this layer's shape, valid until the next layer takes it."""
        device = self.get_parameter(next(iter(self.specs))).device
        return self.format.scratch.take((self.out_features, self.in_features), dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        return quant_linear(x, self.format, self.out_features, self.in_features, self.planes(), self.bias)


def quant_linear(
    x: Tensor,
    format: Format,
    out_features: int,
    in_features: int,
    planes: Mapping[str, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` over planes; autograd keeps the planes only, never the decoded weight.

    Args:
        x: ``[..., I]``.
        format: What the planes mean.
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


class _QuantLinear(torch.autograd.Function):
    """Saves planes, decodes in forward and again in backward; planes get no gradient."""

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
        weight_OI = _decode(ctx, planes, x)
        return functional.linear(x, weight_OI, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        planes = ctx.saved_tensors  # asked for once: recompute hands them out a single time
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(_decode(ctx, planes, grad))
        if ctx.needs_input_grad[1]:
            sum_dtype = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=sum_dtype).to(ctx.bias_dtype)
        return (grad_x, grad_bias, None, None, None, *(None for _ in planes))


def _decode(ctx: Any, planes: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The weight in the dtype of ``like``, in the format's scratch."""
    out = ctx.format.scratch.take(ctx.shape, like.dtype, like.device)
    decoded: Tensor = ctx.format.decode(dict(zip(ctx.names, planes, strict=True)), *ctx.shape, like.dtype, out)
    return decoded
