"""Quantized mixture-of-experts layers, for the modules whose weights transformers v5 fuses into 3-D parameters.

Legend: E = experts, K = experts per token, S = tokens, H = hidden, I = inner size of an expert, O x I a projection.

A fused module (``MixtralExperts``, ``Qwen3MoeExperts``, ...) has ``gate_up_proj`` [E, 2I, H] (or ``up_proj`` [E, I, H])
and ``down_proj`` [E, H, I]. Here each of them is a stack of separately quantized weights, and a forward pass decodes
only the experts that tokens were routed to, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ingle.errors import QuantizationError
from ingle.quant.format import Format
from ingle.quant.linear import QuantModule, quant_linear

#: The projections that a fused module can have.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class QuantStack(QuantModule):
    """One projection of all experts: planes ``[E, ...]``, with each expert quantized separately."""

    def decode(self, expert: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Returns the weight ``[O, I]`` of one expert in a new tensor or in ``out``."""
        return self.format.decode(self.expert_planes(expert), self.out_features, self.in_features, dtype, out)

    def expert_planes(self, expert: int) -> dict[str, Tensor]:
        """Returns views of the planes of one expert."""
        return {name: plane[expert] for name, plane in self.planes().items()}

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """``[S, I]`` to ``[S, O]`` through one expert."""
        return quant_linear(x, self.format, self.out_features, self.in_features, self.expert_planes(expert))


def is_fused_experts(module: nn.Module) -> bool:
    """Returns whether a module has transformers' interface of fused experts, as ``QuantExperts`` requires."""
    attributes = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    up = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    projections = [module._parameters.get(name) for name in (up, "down_proj")]
    return (
        all(hasattr(module, attribute) for attribute in attributes)
        and (hasattr(module, "_apply_gate") or not module.has_gate)
        and all(weight is not None and weight.dim() == 3 for weight in projections)
    )


def matrix_shape(experts: nn.Module, projection: str) -> tuple[int, int]:
    """Returns the output and input features of one expert in a projection of a fused module."""
    _, first, second = experts.get_parameter(projection).shape
    return (second, first) if getattr(experts, "is_transposed", False) else (first, second)


class QuantExperts(nn.Module):
    """Replaces a module of fused experts by one that computes the same with quantized weights.

    Biases and submodules keep their names, and the gate (plain SwiGLU, clamped, ...) is that of the original.

    Args:
        original: The fused module. Its parameters and submodules move to this module.
        formats: The format of each projection; one without a format keeps its parameter.
        name: The module's name for errors.

    Raises:
        QuantizationError: The module does not have the interface of fused experts, or a weight cannot be encoded.
    """

    def __init__(self, original: nn.Module, formats: Mapping[str, Format | None], *, name: str = "experts") -> None:
        super().__init__()
        if not is_fused_experts(original):
            raise QuantizationError(f"{name} ({type(original).__name__}) is not a module of fused experts.", where=name)
        fused: Any = original
        self.num_experts: int = fused.num_experts
        self.has_gate: bool = fused.has_gate
        self.is_transposed: bool = fused.is_transposed
        for key in list(original._parameters):
            format = formats.get(key) if key in PROJECTIONS else None
            if format is None or original._parameters[key] is None:
                self.register_parameter(key, original._parameters.pop(key))
                continue
            shape = matrix_shape(original, key)
            parameter: Any = original._parameters.pop(key)
            stack = QuantStack(
                format,
                *shape,
                num_stacked=self.num_experts,
                transposed=fused.is_transposed,
                weight_dtype=parameter.dtype,
                device=parameter.device,
            )
            if not parameter.is_meta:
                stack.quantize(parameter, name=f"{name}.{key}")
            self.add_module(key, stack)
        for key, child in original.named_children():
            self.add_module(key, child)
        # Kept for its gate. It has no tensors any more; it is not registered, so that parameter names do not change.
        self.__dict__["original"] = original

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routes every token through its experts.

        Args:
            hidden_states: ``[S, H]``.
            top_k_index: ``[S, K]``, expert numbers; a number of ``num_experts`` or more means no expert.
            top_k_weights: ``[S, K]``, the router's weights.

        Returns:
            ``[S, H]``, the weighted sum over the experts of each token, accumulated in float32.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros(hidden_states.shape, dtype=dtype, device=hidden_states.device)
        # Sort by expert so that each is decoded once. The sort is stable so that sums are reproducible.
        experts, order = top_k_index.flatten().sort(stable=True)
        start = 0
        for expert, count in zip(
            *(part.tolist() for part in experts.unique_consecutive(return_counts=True)), strict=True
        ):
            chosen, start = order[start : start + count], start + count
            if expert >= self.num_experts:
                continue
            tokens = chosen // top_k_index.shape[-1]
            outputs = self._run_expert(hidden_states[tokens], expert)
            weights = top_k_weights.flatten()[chosen].unsqueeze(-1)
            total = total.index_add(0, tokens, (outputs * weights).to(dtype))
        return total.to(hidden_states.dtype)

    def _run_expert(self, x: Tensor, expert: int) -> Tensor:
        """Returns the output of one expert for ``[S, H]``, without the router's weight."""
        inner = self._project("gate_up_proj" if self.has_gate else "up_proj", x, expert)
        original: Any = self.__dict__["original"]
        inner = original._apply_gate(inner) if self.has_gate else original.act_fn(inner)
        outputs = self._project("down_proj", inner, expert)
        return original.post_expert_norm(outputs) if original.has_post_expert_norm else outputs

    def _project(self, key: str, x: Tensor, expert: int) -> Tensor:
        plain = self._parameters.get(key)
        if plain is None:
            projected: Tensor = self.get_submodule(key)(x, expert)
        else:
            projected = x @ plain[expert] if self.is_transposed else functional.linear(x, plain[expert])
        bias = self._parameters.get(f"{key}_bias")
        return projected if bias is None else projected + bias[expert].to(projected.dtype)

    def extra_repr(self) -> str:
        """Returns what ``print(model)`` shows."""
        return f"num_experts={self.num_experts}"
