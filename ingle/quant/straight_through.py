"""Training every weight of a linear map that answers with ternary weights: the gradient goes straight through.

The module keeps an ordinary floating weight, which the optimizer moves a little at every step.  Forward packs it as
the ``ternary`` format does and multiplies with what that decodes to; backward takes the gradient of the decoded weight
for that of the floating one.  So a weight changes its answer only once it has moved across half the scale.

Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432),
section 4; Wang et al. 2023, "BitNet" (arXiv 2310.11453), section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ingle.quant.ternary import Ternary


class TernaryLinear(nn.Linear):
    """A linear map with a floating weight that answers with ternary ones.

    Args:
        format: How the weight is rounded; layers of a model share one, and with it the memory they decode into.
        linear: The map whose weight and bias it takes over.
    """

    def __init__(self, format: Ternary, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.format = format
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # packing is no operator of a graph
    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        answer: Tensor = _StraightThrough.apply(x, self.weight, self.bias, self.format)  # type: ignore[no-untyped-call]
        return answer

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the ternary weight in the place of the floating one; the answers stay as they are."""
        planes = self.format.encode(self.weight)
        self.weight.copy_(self.format.decode(planes, self.out_features, self.in_features, self.weight.dtype))


def settle(model: nn.Module) -> None:
    """Makes the weights of a model that was trained in ternary what its layers answer with, to be saved."""
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.settle()


class _StraightThrough(torch.autograd.Function):
    """Saves ``x`` and two bits a weight; decodes them again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, format: Ternary) -> Tensor:
        planes = format.encode(weight_OI)
        ctx.save_for_backward(x, *planes.values())
        ctx.format, ctx.names, ctx.shape = format, tuple(planes), tuple(weight_OI.shape)
        ctx.dtypes = weight_OI.dtype, None if bias is None else bias.dtype
        return functional.linear(x, _decode(ctx, planes, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *planes = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(_decode(ctx, dict(zip(ctx.names, planes, strict=True)), grad))
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            sum_dtype = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = rows.sum(0, dtype=sum_dtype).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def _decode(ctx: Any, planes: dict[str, Tensor], like: Tensor) -> Tensor:
    """The ternary weight in the dtype of ``like``, in the format's scratch."""
    format: Ternary = ctx.format
    out = format.scratch.take(ctx.shape, like.dtype, like.device)
    out_features, in_features = ctx.shape
    return format.decode(planes, out_features, in_features, like.dtype, out)
