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
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj", "weight")
#: Products of fewer rows are computed by other kernels, which round in another way. With these, the result of a token
#: does not depend on how many others its expert gets.
LEAST_ROWS = 16


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


def is_every_token_experts(module: nn.Module) -> bool:
    """Returns whether a module has the interface of Llama 4's experts, as ``EveryTokenExperts`` requires."""
    projections = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return type(module).__name__ == "Llama4TextExperts" and all(
        weight is not None and weight.dim() == 3 for weight in projections
    )


def is_identity_experts(module: nn.Module) -> bool:
    """Returns whether a module has the interface of LongCat's experts, as ``IdentityExperts`` requires."""
    return type(module).__name__ == "LongcatFlashExperts" and module._parameters.get("down_proj") is not None


def is_parallel_experts(module: nn.Module) -> bool:
    """Returns whether a module has the interface of one projection of JetMoe, as ``ParallelExperts`` requires."""
    return type(module).__name__ == "JetMoeParallelExperts"


def is_experts(module: nn.Module) -> bool:
    """Returns whether a module holds stacked experts that can be quantized."""
    return is_fused_experts(module) or _special_class(module) is not None


def is_transposed(module: nn.Module) -> bool:
    """Returns whether a module of stacked experts stores its weights as ``[E, I, O]``."""
    return is_every_token_experts(module) or bool(getattr(module, "is_transposed", False))


def projection_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns out_features and in_features of each projection of a module of stacked experts."""
    weights = {key: weight for key, weight in module._parameters.items() if weight is not None and key in PROJECTIONS}
    turn = -1 if is_transposed(module) else 1
    return {key: (weight.shape[1:][::turn][0], weight.shape[1:][::turn][1]) for key, weight in weights.items()}


class QuantExperts(nn.Module):
    """Replaces a module of fused experts by one that computes the same with quantized weights.

    Biases and submodules keep their names, and the gate (plain SwiGLU, clamped, ...) is that of the original.

    Args:
        original: The fused module. Its parameters and submodules move to this module.
        formats: Format of the planes of each projection. A projection without one stays a plain parameter.
        name: The module's name for errors.

    Raises:
        QuantizationError: The module does not have the interface of fused experts, or a weight cannot be encoded.
    """

    def __init__(self, original: nn.Module, formats: Mapping[str, Format | None], *, name: str = "experts") -> None:
        super().__init__()
        if not is_experts(original):
            raise QuantizationError(f"{name} ({type(original).__name__}) is not a module of fused experts.", where=name)
        fused: Any = original
        self.num_experts: int = fused.num_routed_experts if is_identity_experts(original) else fused.num_experts
        self.has_gate: bool = getattr(fused, "has_gate", True)
        self.transposed = is_transposed(original)
        shapes = projection_shapes(original)
        for key in list(original._parameters):
            parameter = original._parameters.pop(key)
            format = formats.get(key)
            if parameter is None or format is None:
                self.register_parameter(key, parameter)
                continue
            stack = QuantStack(
                format,
                *shapes[key],
                num_stacked=len(parameter),
                transposed=self.transposed,
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
            outputs = self._run_padded(hidden_states[tokens], expert)
            weights = top_k_weights.flatten()[chosen].unsqueeze(-1)
            total = total.index_add(0, tokens, (outputs * weights).to(dtype))
        return total.to(hidden_states.dtype)

    def _run_padded(self, x: Tensor, expert: int) -> Tensor:
        missing = LEAST_ROWS - len(x)
        if missing <= 0:
            return self._run_expert(x, expert)
        return self._run_expert(functional.pad(x, (0, 0, 0, missing)), expert)[: len(x)]

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
            projected = functional.linear(x, plain[expert].t() if self.transposed else plain[expert])
        bias = self._parameters.get(f"{key}_bias")
        return projected if bias is None else projected + bias[expert].to(projected.dtype)

    def extra_repr(self) -> str:
        """Returns what ``print(model)`` shows."""
        return f"num_experts={self.num_experts}"


class EveryTokenExperts(QuantExperts):
    """Replaces Llama 4's experts, which get every token, scaled by the router's weight: zero for most of them.

    The output and the gradients of a zero are zero, so only the other tokens are computed.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Runs ``[E * S, H]``, the tokens of one expert after those of another; returns the same shape."""
        outputs = []
        for expert, x in enumerate(hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])):
            (chosen,) = x.detach().abs().amax(-1).nonzero(as_tuple=True)
            output = x.new_zeros(x.shape)
            if len(chosen):
                output = output.index_copy(0, chosen, self._run_padded(x[chosen], expert))
            outputs.append(output)
        return torch.cat(outputs)

    def _run_expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self._project("gate_up_proj", x, expert).chunk(2, dim=-1)
        return self._project("down_proj", up * self.__dict__["original"].act_fn(gate), expert)


class IdentityExperts(QuantExperts):
    """Replaces LongCat's experts, of which those with the highest numbers return their input."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Takes ``[S, H]``, ``[S, K]`` and ``[S, K]``; returns ``[S, H]``."""
        kept = top_k_weights.masked_fill(top_k_index < self.num_experts, 0.0).sum(-1, keepdim=True)
        return super().forward(hidden_states, top_k_index, top_k_weights) + (hidden_states * kept).to(
            hidden_states.dtype
        )

    def _run_expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self._project("gate_up_proj", x, expert).chunk(2, dim=-1)
        return self._project("down_proj", self.__dict__["original"].act_fn(gate) * up, expert)


class ParallelExperts(QuantExperts):
    """Replaces one projection of JetMoe's experts, which gets its tokens sorted by expert."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """Maps ``[S, I]``, of which ``expert_size`` rows are for each expert, to ``[S, O]``."""
        parts = enumerate(inputs.split(expert_size))
        return torch.cat(
            [self._run_padded(x, expert) if len(x) else self._run_expert(x, expert) for expert, x in parts]
        )

    def _run_expert(self, x: Tensor, expert: int) -> Tensor:
        return self._project("weight", x, expert)


def quantize_experts(original: nn.Module, formats: Mapping[str, Format | None], *, name: str) -> QuantExperts:
    """Returns the replacement of a module of stacked experts; arguments and errors are those of ``QuantExperts``."""
    return (_special_class(original) or QuantExperts)(original, formats, name=name)


def _special_class(module: nn.Module) -> type[QuantExperts] | None:
    """Returns the replacement for experts with an interface of their own."""
    if is_every_token_experts(module):
        return EveryTokenExperts
    if is_identity_experts(module):
        return IdentityExperts
    return ParallelExperts if is_parallel_experts(module) else None
