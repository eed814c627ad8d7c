"""LoRA over a frozen weight as one step of autograd: ``y = x W^T + b + scale * dropout(x) A^T B^T``.

Left to autograd, LoRA costs a copy of every output, keeps dropped-out inputs, and adds a full-size gradient for
each of its two products. Here the thin products are added in place, only x and x A^T are kept, W is asked for
again in backward (so that a packed base is decoded then and never stored), and W + scale * B A never exists.

Several projections of one input (q, k, v; gate, up) go through together: their A matrices become one product.

Legend: N tokens, I in_features, O out_features, R rank, S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Gives the frozen weight [O, I] in a dtype; what it returns is valid until any weight is asked for again.
Weight = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Projection:
    """One frozen linear map and its low-rank change.

    Attributes:
        weight: Gives W [O, I].
        bias: Frozen, [O].
        lora_a: Trained, float32, [R, I].
        lora_b: Trained, float32, [O, R].
        scale: Factor on the change.
        dropout: Share of x set to zero on the way into A; the rest grows by ``1 / (1 - dropout)``.
    """

    weight: Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout: float = 0.0


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``x W^T + bias + scale * dropout(x) A^T B^T``, [..., I] -> [..., O]; arguments as in :class:`Projection`.

    Dropout is drawn from torch's CPU generator, so seeding it, or recomputing under
    ``torch.utils.checkpoint``, gives the same mask again. Gradients go to x, A and B.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3.
    """
    return lora_linears(x, [Projection(weight, bias, lora_a, lora_b, scale, dropout)])[0]


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of one input through several projections.

    Args:
        x: [..., I], in the dtype of the products.
        projections: What to project with; their O and R may differ.

    Returns:
        One [..., O] each.
    """
    # Seeds, not masks, are kept: a mask is as large as x.
    seeds = tuple(int(torch.randint(2**63 - 1, ())) if p.dropout else 0 for p in projections)
    factors = [factor for p in projections for factor in (p.lora_a, p.lora_b)]
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, tuple(projections), seeds, *factors)  # type: ignore[no-untyped-call]
    return outputs


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], seeds: tuple[int, ...], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        ctx.projections, ctx.seeds = projections, seeds
        xa_NS = _project_down(x_NI, projections, seeds)
        ctx.save_for_backward(x_NI, xa_NS, *factors)
        outputs = []
        for p, xa_NR in zip(projections, _split(xa_NS, projections), strict=True):
            weight_OI = p.weight(x.dtype)
            y_NO = torch.nn.functional.linear(x_NI, weight_OI, None if p.bias is None else p.bias.to(x.dtype))
            y_NO.addmm_(xa_NR, _scaled_b(p, x.dtype).t())
            outputs.append(y_NO.view(*x.shape[:-1], y_NO.shape[-1]))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_NI, xa_NS, *_ = ctx.saved_tensors
        projections: tuple[Projection, ...] = ctx.projections
        dtype = x_NI.dtype
        grads_NO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        gb_NS = torch.empty_like(xa_NS)
        grad_factors: list[Tensor] = []
        for p, g_NO, xa_NR, gb_NR in zip(
            projections, grads_NO, _split(xa_NS, projections), _split(gb_NS, projections), strict=True
        ):
            torch.mm(g_NO, _scaled_b(p, dtype), out=gb_NR)
            # (x A^T)^T g is the layout in which the thin product is fast; the small result is turned instead.
            grad_b_OR = (xa_NR.t() @ g_NO).t().to(p.lora_b.dtype).mul_(p.scale)
            grad_factors += [torch.empty(0), grad_b_OR]
        grad_factors[::2] = _grad_a(x_NI, gb_NS, projections, ctx.seeds)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_x(grads_NO, gb_NS, projections, ctx.seeds).view(*grads[0].shape[:-1], -1)
        return (grad_x, None, None, *grad_factors)


def _project_down(x_NI: Tensor, projections: tuple[Projection, ...], seeds: tuple[int, ...]) -> Tensor:
    """``dropout(x) A^T`` of all projections side by side, [N, S]."""
    if not any(seeds):
        return x_NI @ _all_a(projections, x_NI.dtype).t()
    return torch.cat(
        [
            _dropped(x_NI, p.dropout, seed) @ p.lora_a.to(x_NI.dtype).t()
            for p, seed in zip(projections, seeds, strict=True)
        ],
        dim=1,
    )


def _grad_a(
    x_NI: Tensor, gb_NS: Tensor, projections: tuple[Projection, ...], seeds: tuple[int, ...]
) -> Sequence[Tensor]:
    """``(g B)^T dropout(x)`` of each projection, [R, I]."""
    dtype = projections[0].lora_a.dtype
    if not any(seeds):
        grad_SI = (gb_NS.t() @ x_NI).to(dtype)
        return _split(grad_SI, projections, dim=0)
    return [
        (gb_NR.t() @ _dropped(x_NI, p.dropout, seed)).to(dtype)
        for p, seed, gb_NR in zip(projections, seeds, _split(gb_NS, projections), strict=True)
    ]


def _grad_x(
    grads_NO: Sequence[Tensor], gb_NS: Tensor, projections: tuple[Projection, ...], seeds: tuple[int, ...]
) -> Tensor:
    """``sum of g W + mask * (g B A)`` over the projections, [N, I]."""
    dtype = gb_NS.dtype
    grad_x_NI = grads_NO[0] @ projections[0].weight(dtype)
    for p, g_NO in zip(projections[1:], grads_NO[1:], strict=True):
        grad_x_NI.addmm_(g_NO, p.weight(dtype))
    if not any(seeds):
        return grad_x_NI.addmm_(gb_NS, _all_a(projections, dtype))
    for p, seed, gb_NR in zip(projections, seeds, _split(gb_NS, projections), strict=True):
        grad_x_NI += _dropped(gb_NR @ p.lora_a.to(dtype), p.dropout, seed)
    return grad_x_NI


def _all_a(projections: tuple[Projection, ...], dtype: torch.dtype) -> Tensor:
    """The A matrices one below the other, [S, I]."""
    if len(projections) == 1:
        return projections[0].lora_a.to(dtype)
    return torch.cat([p.lora_a.to(dtype) for p in projections])


def _scaled_b(p: Projection, dtype: torch.dtype) -> Tensor:
    """``scale * B``, rounded once, [O, R]."""
    return (p.lora_b * p.scale).to(dtype)


def _split(values: Tensor, projections: tuple[Projection, ...], dim: int = 1) -> tuple[Tensor, ...]:
    """Cuts S into the R of each projection."""
    return torch.split(values, [len(p.lora_a) for p in projections], dim)


def _dropped(values_NI: Tensor, dropout: float, seed: int) -> Tensor:
    """Inverted dropout that a seed decides: the same seed and shape drop the same elements again."""
    if not dropout:
        return values_NI
    generator = torch.Generator(values_NI.device).manual_seed(seed)
    kept = torch.empty(values_NI.shape, dtype=values_NI.dtype, device=values_NI.device)
    kept.bernoulli_(1 - dropout, generator=generator)
    return kept.mul_(values_NI).mul_(1 / (1 - dropout))
