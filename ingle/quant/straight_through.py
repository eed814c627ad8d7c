"""Trains linear layers that compute with ternary weights, with a straight-through estimator.

The module keeps an ordinary floating-point weight, which the optimizer updates. The forward pass quantizes it to the
``ternary`` format and multiplies by the decoded weight; the backward pass uses the gradient of the decoded weight as
that of the floating-point one. A weight changes its output only after it has moved across half the scale.

Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432),
section 4; Wang et al. 2023, "BitNet" (arXiv 2310.11453), section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ingle.quant.linear import decode_to_scratch
from ingle.quant.ternary import Ternary


class TernaryLinear(nn.Linear):
    """A linear layer that trains a floating-point weight and computes with its ternary value.

    Args:
        format: The ternary format. Layers of a model share it, and with it the scratch buffer.
        linear: The layer to replace; its weight and bias are used.
    """

    def __init__(self, format: Ternary, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.format = format
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # encoding is not an operator of a graph
    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        output: Tensor = _StraightThrough.apply(x, self.weight, self.bias, self.format)  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def settle(self) -> None:
        """Replaces the floating-point weight by its ternary value; outputs stay the same."""
        planes = self.format.encode(self.weight)
        self.weight.copy_(self.format.decode(planes, self.out_features, self.in_features, self.weight.dtype))


def settle(model: nn.Module) -> None:
    """Replaces every trained weight by the ternary value that its layer computes with, before the model is saved."""
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.settle()


class _StraightThrough(torch.autograd.Function):
    """Saves ``x`` and two bits per weight, and decodes them again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, format: Ternary) -> Tensor:
        planes = format.encode(weight_OI)
        ctx.save_for_backward(x, *planes.values())
        ctx.format, ctx.names, ctx.shape = format, tuple(planes), tuple(weight_OI.shape)
        ctx.dtypes = weight_OI.dtype, None if bias is None else bias.dtype
        decoded = decode_to_scratch(format, planes, ctx.shape, x)
        return functional.linear(x, decoded, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *planes = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            named = dict(zip(ctx.names, planes, strict=True))
            grad_x = grad.matmul(decode_to_scratch(ctx.format, named, ctx.shape, grad))
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            sum_dtype = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = rows.sum(0, dtype=sum_dtype).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None
