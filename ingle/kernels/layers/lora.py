"""LoRA over a frozen weight as one step of autograd: ``y = x W^T + b + scale * dropout(x) A^T B^T``.

With plain autograd, LoRA copies every output, keeps dropped-out inputs, and adds a full-size gradient for each of its
two products. Here the thin products are added in place, only x and x A^T are saved, backward requests W again (so a
quantized base is decoded then and never stored), and W + scale * B A never exists.

Several projections of one input (q, k, v; gate, up) are computed together: their A matrices become one product.

Inputs may be summed in groups of neighbors before A (QA-LoRA); then the sums are saved instead of x.

Legend: N tokens, I in_features, O out_features, G groups of inputs, R rank, S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ingle.kernels.layers.importance import SquaredInputs, observe

#: Returns the frozen weight [O, I] in a dtype; the result is valid until the next request for any weight.
Weight = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Projection:
    """One frozen linear layer and its low-rank update.

    Attributes:
        weight: Returns W [O, I].
        bias: Frozen, [O].
        lora_a: Trained, float32, [R, G]; None without an update.
        lora_b: Trained, float32, [O, R]; None without an update.
        scale: Factor on the update.
        dropout: Share of the inputs of A that is set to zero; the rest is scaled by ``1 / (1 - dropout)``.
        group_size: Inputs that are summed before A.
        holds_change: Whether the weight already contains the update. It is then not added again, and A and B get the
            gradient of ``W + scale * B A`` as if quantization had not rounded it (straight-through estimator).
        seed: Seed of the dropout, drawn by :func:`seeded`.
        inputs: Collects statistics of x for an importance matrix.
        product: Returns x W^T without storing W, or None where that is not faster.
        gain: Factor on each output before the bias, float32, [O] (DoRA); or None.
    """

    weight: Weight
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scale: float = 1.0
    dropout: float = 0.0
    group_size: int = 1
    holds_change: bool = False
    seed: int = 0
    inputs: SquaredInputs | None = None
    product: Callable[[Tensor], Tensor | None] | None = None
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        """R; 0 without an update."""
        return 0 if self.lora_a is None else len(self.lora_a)

    def operands(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns what gets a gradient: A, B and the gain."""
        return self.lora_a, self.lora_b, self.gain

    def scaled_b(self, dtype: torch.dtype) -> Tensor:
        """Returns ``scale * B``, rounded once, [O, R]."""
        assert self.lora_b is not None
        return (self.lora_b * self.scale).to(dtype)


Projections = Sequence[Projection]


def lora_linears(x: Tensor, projections: Projections) -> tuple[Tensor, ...]:
    """Returns ``gain * (x W^T + scale * dropout(x) A^T B^T) + bias`` of one input through several projections.

    Dropout draws from torch's CPU generator, so seeding it, or recomputing under ``torch.utils.checkpoint``, repeats
    the mask. Differentiable in x, A, B and the gains.

    Args:
        x: [..., I], in the dtype of the products.
        projections: The layers; their O and R may differ.

    Returns:
        [..., O] for each projection.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3.
    """
    operands = [operand for p in projections for operand in p.operands()]
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, seeded(projections), *operands)  # type: ignore[no-untyped-call]
    return outputs


def seeded(projections: Projections) -> tuple[Projection, ...]:
    """Returns the projections with new dropout seeds. Seeds are saved instead of masks, which are as large as x."""
    return tuple(replace(p, seed=int(torch.randint(1, 2**63 - 1, ()))) if p.dropout else p for p in projections)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Projections, *operands: Tensor | None) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        kept = pool(x_NI, _group_size(projections))
        outputs, xa_NS, raw = project(x, projections, kept)
        ctx.projections = projections
        trains_a = any(p.lora_a is not None and p.lora_a.requires_grad for p in projections)
        ctx.save_for_backward(kept if trains_a else None, xa_NS, *raw)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        kept, xa_NS, *raw = ctx.saved_tensors
        projections: Projections = ctx.projections
        grads_NO, grads_gain = through_gains([grad.reshape(-1, grad.shape[-1]) for grad in grads], raw, projections)
        gb_NS, grads_b = through_b(grads_NO, xa_NS, projections)
        grads_a = [None] * len(projections) if kept is None else through_a(gb_NS, kept, projections)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = through_weights(grads_NO, gb_NS, projections).view(*grads[0].shape[:-1], -1)
        return (grad_x, None, *interleave(grads_a, grads_b, grads_gain))


# The parts, for functions that fuse more than one layer. None of them is differentiable.


class Projected(NamedTuple):
    """What :func:`project` returns.

    Attributes:
        outputs: [..., O] of each projection. None is a view: a layer may add to it in place (Falcon does), which
            autograd forbids for views.
        xa_NS: The inputs of B, side by side.
        raw: The outputs before gain and bias, where there is a gain.
    """

    outputs: list[Tensor]
    xa_NS: Tensor
    raw: list[Tensor | None]


def project(x: Tensor, projections: Projections, pooled: Tensor | None = None) -> Projected:
    """Computes the outputs of all projections.

    Args:
        x: The input, [..., I].
        projections: The layers.
        pooled: The input's sums over groups, [N, G], if the caller has already computed them.
    """
    observe(x, [p.inputs for p in projections if p.inputs is not None])
    xa_NS = _project_down(x.reshape(-1, x.shape[-1]) if pooled is None else pooled, projections)
    outputs: list[Tensor] = []
    raw: list[Tensor | None] = []
    for p, xa_NR in zip(projections, _split(xa_NS, projections), strict=True):
        bias = None if p.bias is None or p.gain is not None else p.bias.detach().to(x.dtype)
        y = None if p.product is None else p.product(x)
        if y is None:
            y = _multiply(x, p.weight(x.dtype), bias)
        elif bias is not None:
            y += bias
        if p.rank and not p.holds_change:
            y.view(-1, y.shape[-1]).addmm_(xa_NR, p.scaled_b(x.dtype).t())
        raw.append(None if p.gain is None else y)
        outputs.append(y if p.gain is None else with_gain(y, p))
    return Projected(outputs, xa_NS, raw)


def with_gain(raw: Tensor, p: Projection) -> Tensor:
    """Returns an output with gain and bias, as a new tensor."""
    assert p.gain is not None
    y = raw * p.gain.detach().to(raw.dtype)
    return y if p.bias is None else y.add_(p.bias.detach().to(raw.dtype))


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``x W^T + bias``; torch's own product with a bias is a view of its rows."""
    if bias is None:
        return linear(x, weight)
    y = x.new_empty(*x.shape[:-1], len(weight))
    torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t(), out=y.view(-1, len(weight)))
    return y


def through_gains(
    grads_NO: Sequence[Tensor], raw: Sequence[Tensor | None], projections: Projections
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns the gradients of the outputs before their gains, and of every gain, float32 [O]."""
    before: list[Tensor] = []
    of_gains: list[Tensor | None] = []
    for p, g_NO, y in zip(projections, grads_NO, raw, strict=True):
        if p.gain is None or y is None:
            before.append(g_NO)
            of_gains.append(None)
            continue
        of_gains.append((g_NO * y.reshape(g_NO.shape)).sum(0, dtype=torch.float32))
        before.append(g_NO * p.gain.detach().to(g_NO.dtype))
    return before, of_gains


def through_b(
    grads_NO: Sequence[Tensor], xa_NS: Tensor, projections: Projections
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradients of ``x A^T``, [N, S], and of every B, [O, R]."""
    gb_NS = torch.empty_like(xa_NS)
    grads_b: list[Tensor | None] = []
    for p, g_NO, xa_NR, gb_NR in zip(
        projections, grads_NO, _split(xa_NS, projections), _split(gb_NS, projections), strict=True
    ):
        if not p.rank:
            grads_b.append(None)
            continue
        assert p.lora_b is not None
        torch.mm(g_NO, p.scaled_b(xa_NS.dtype), out=gb_NR)
        # (x A^T)^T g is the fast layout of the thin product; transposing the small result is cheap.
        grads_b.append((xa_NR.t() @ g_NO).t().to(p.lora_b.dtype).mul_(p.scale))
    return gb_NS, grads_b


def through_a(gb_NS: Tensor, x_NI: Tensor, projections: Projections) -> list[Tensor | None]:
    """Returns the gradient of every A, ``(g B)^T dropout(pool(x))``, [R, G]; x may already be pooled."""
    parts: Sequence[Tensor]
    if _share_product(projections):
        parts = _split(gb_NS.t() @ _input_of_a(x_NI, projections), projections, dim=0)
    else:
        parts = [
            gb_NR.t() @ _dropped(_input_of_a(x_NI, [p]), p)
            for p, gb_NR in zip(projections, _split(gb_NS, projections), strict=True)
        ]
    return [None if p.lora_a is None else part.to(p.lora_a.dtype) for p, part in zip(projections, parts, strict=True)]


def through_weights(grads_NO: Sequence[Tensor], gb_NS: Tensor, projections: Projections) -> Tensor:
    """Returns the gradient of x, [N, I]: the sum over the projections of ``g W + spread(mask * (g B A))``."""
    dtype = gb_NS.dtype
    grad_x_NI = grads_NO[0] @ projections[0].weight(dtype)
    for p, g_NO in zip(projections[1:], grads_NO[1:], strict=True):
        grad_x_NI.addmm_(g_NO, p.weight(dtype))
    if _share_product(projections) and not any(p.holds_change for p in projections):
        if gb_NS.shape[1]:
            _add_through_a_(grad_x_NI, gb_NS, _all_a(projections, dtype), _group_size(projections))
        return grad_x_NI
    for p, gb_NR in zip(projections, _split(gb_NS, projections), strict=True):
        if p.lora_a is not None and not p.holds_change:
            grad_x_NI += spread(_dropped(gb_NR @ p.lora_a.to(dtype), p), p.group_size, grad_x_NI.shape[1])
    return grad_x_NI


def _add_through_a_(grad_x_NI: Tensor, gb_NS: Tensor, a_SG: Tensor, group_size: int) -> None:
    if group_size == 1:
        grad_x_NI.addmm_(gb_NS, a_SG)
    elif grad_x_NI.shape[1] % group_size:
        grad_x_NI += spread(gb_NS @ a_SG, group_size, grad_x_NI.shape[1])
    else:
        grad_x_NI.view(len(grad_x_NI), -1, group_size).add_((gb_NS @ a_SG).unsqueeze(-1))


def interleave(*grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the gradients of all A, B and gains in the order of :meth:`Projection.operands`."""
    return [grad for of_one in zip(*grads, strict=True) for grad in of_one]


def pool(x_NI: Tensor, group_size: int) -> Tensor:
    """Returns sums over groups of neighbors, [N, G]; the last group may be short."""
    if group_size == 1:
        return x_NI
    missing = -x_NI.shape[1] % group_size
    if missing:
        x_NI = torch.nn.functional.pad(x_NI, (0, missing))
    return x_NI.view(len(x_NI), -1, group_size).sum(-1)


def spread(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """Repeats each of ``[..., G]`` for all inputs of its group, ``[..., I]``: the transpose of :func:`pool`."""
    return values if group_size == 1 else values.repeat_interleave(group_size, dim=-1)[..., :in_features]


def _project_down(x_NI: Tensor, projections: Projections) -> Tensor:
    if not any(p.rank for p in projections):
        return x_NI.new_empty(len(x_NI), 0)
    dtype = x_NI.dtype
    if _share_product(projections):
        return _input_of_a(x_NI, projections) @ _all_a(projections, dtype).t()
    parts = [_dropped(_input_of_a(x_NI, [p]), p) @ p.lora_a.to(dtype).t() for p in projections if p.lora_a is not None]
    return torch.cat(parts, dim=1)


def _share_product(projections: Projections) -> bool:
    """Returns whether one product serves all A matrices."""
    return not any(p.dropout for p in projections) and len({p.group_size for p in projections if p.rank}) <= 1


def _group_size(projections: Projections) -> int:
    """Returns the group size that all projections share, so that x itself need not be saved; 1 if they differ."""
    sizes = {p.group_size for p in projections if p.rank}
    return sizes.pop() if len(sizes) == 1 else 1


def _input_of_a(x: Tensor, projections: Projections) -> Tensor:
    """Returns the input of the A matrices: x or its sums over groups."""
    widths = {p.lora_a.shape[1] for p in projections if p.lora_a is not None}
    return x if not widths or x.shape[1] in widths else pool(x, _group_size(projections))


def _all_a(projections: Projections, dtype: torch.dtype) -> Tensor:
    """Returns the A matrices concatenated, [S, I]."""
    factors = [p.lora_a.detach().to(dtype) for p in projections if p.lora_a is not None]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _split(values: Tensor, projections: Projections, dim: int = 1) -> tuple[Tensor, ...]:
    """Splits S into the R of each projection."""
    return torch.split(values, [p.rank for p in projections], dim)


def _dropped(values_NI: Tensor, p: Projection) -> Tensor:
    """Returns the values after inverted dropout; the same seed and shape drop the same elements."""
    if not p.dropout:
        return values_NI
    generator = torch.Generator(values_NI.device).manual_seed(p.seed)
    kept = torch.empty(values_NI.shape, dtype=values_NI.dtype, device=values_NI.device)
    kept.bernoulli_(1 - p.dropout, generator=generator)
    return kept.mul_(values_NI).mul_(1 / (1 - p.dropout))
