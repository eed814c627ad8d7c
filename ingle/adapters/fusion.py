"""Replaces the decoder layers of known architectures by fused ones, in one model only.

A fused layer has the same submodules under the same names: no class is patched, no path changes and no weight is
copied.  Its outputs and gradients are first compared with those of the original layer, and a layer that differs is not
used.  Calls that the fused functions do not support (a key-value cache, another device) go to the original layer.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ingle.adapters.lora import LoraLinear
from ingle.adapters.states import Adapted, as_now, own_parameters
from ingle.kernels.attention.bounds import trees_of
from ingle.kernels.attention.cached import KeyStore, store_of
from ingle.kernels.attention.cpu import Scores
from ingle.kernels.attention.spans import AttentionSpans, Heads
from ingle.kernels.layers.decoder_layer import Attention, Boundaries, Mlp, Norm, attend_stored, attention_half, mlp_half
from ingle.kernels.layers.elementwise import on_gpu
from ingle.kernels.layers.importance import SquaredInputs
from ingle.kernels.layers.lora import Projection
from ingle.kernels.layers.stored_layer import StoredLayer, can_prepare
from ingle.kernels.numba.scalars import supported
from ingle.parallel import gathered, is_unit
from ingle.quant.linear import QuantLinear

#: Classes of layers that compute ``h + attention(norm h)`` and then ``h + swiglu(norm h)`` with rotary positions.
_KNOWN = {
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
#: Largest accepted norm of the difference from the original layer, relative to the norm of its result.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class FusionReport:
    """Result of :func:`fuse`.

    Attributes:
        fused: Number of fused layers.
        reasons: Number of other layers by the reason why they were not fused.
    """

    fused: int
    reasons: dict[str, int]


def fuse(model: nn.Module) -> FusionReport:
    """Fuses every decoder layer of a known class whose base is frozen and whose results stay the same.

    Call it last, after adapters are attached and recompute is enabled. A model that is sharded needs the two halves:
    :func:`insert_fused` before it is sharded, and :func:`enable_fused` after its weights are loaded.

    Args:
        model: Model with its weights loaded.
    """
    return enable_fused(model, insert_fused(model, next(model.parameters()).device))


def insert_fused(model: nn.Module, device: torch.device) -> FusionReport:
    """Replaces every decoder layer that may be fused, without using the fused functions yet.

    Args:
        model: Its weights may be on the meta device; recompute is enabled.
        device: Device on which it will compute.

    Returns:
        The layers that cannot be fused, by reason; none is fused yet.
    """
    reasons = Counter[str]()
    for stack in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, layer in enumerate(stack):
            if isinstance(layer, FusedLayer) or not _is_decoder_layer(layer):
                continue
            reason = _obstacle(layer, device)
            if reason is None:
                stack[index] = FusedLayer(layer)
            else:
                reasons[reason] += 1
    return FusionReport(0, dict(reasons))


def enable_fused(model: nn.Module, inserted: FusionReport) -> FusionReport:
    """Uses the fused functions in all inserted layers that agree with the original ones; all ranks call it together.

    Args:
        model: Model with its weights loaded.
        inserted: What :func:`insert_fused` returned.
    """
    fused, reasons = 0, Counter[str](inserted.reasons)
    verdicts: dict[tuple[Any, ...], str | None] = {}
    for stack in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, layer in enumerate(stack):
            if not isinstance(layer, FusedLayer):
                continue
            signature = layer.signature()
            if signature not in verdicts:
                with gathered(layer):
                    verdicts[signature] = disagreement(layer.original, layer)
            reason = verdicts[signature]
            layer.enabled = reason is None
            if reason is None:
                fused += 1
                continue
            reasons[reason] += 1
            if not is_unit(layer):
                stack[index] = layer.original
    return FusionReport(fused, dict(reasons))


class FusedLayer(nn.Module):
    """A decoder layer that runs as two fused functions.

    Args:
        original: The layer to replace; it still handles calls that the fused functions do not support.

    Attributes:
        enabled: Whether the fused functions are used at all.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        # Kept for its forward; not registered, since its submodules are registered here already.
        self.__dict__["original"] = original
        self.enabled = False
        self.train(original.training)
        attention: Any = original.self_attn
        self._heads = Heads(
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            attention.head_dim,
        )
        self._scores = Scores(attention.scaling)
        window = getattr(attention, "sliding_window", None)
        if _name(original).endswith("MistralDecoderLayer"):
            window = getattr(attention.config, "sliding_window", None)
        self._window: int | None = window

    def signature(self) -> tuple[Any, ...]:
        """Returns a key that is equal for layers that compute in the same way."""
        modules = [
            (type(m).__name__, type(getattr(m, "base", None)).__name__, tuple(tuple(p.shape) for p in m.parameters()))
            for m in self.children()
        ]
        return (self._heads, self._scores, self._window, *modules)

    @property
    def original(self) -> nn.Module:
        """The layer that was replaced."""
        original: nn.Module = self.__dict__["original"]
        return original

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the activations of the layer are recomputed."""
        return bool(getattr(self.original, "gradient_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        # transformers sets its attributes on the modules that it finds, and the original layer is not among them.
        original: Any = self.original
        original._gradient_checkpointing_func = getattr(self, "_gradient_checkpointing_func", None)
        original.gradient_checkpointing = enabled

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the hidden states after the layer, ``[1, N, H]``."""
        trees, store = trees_of(kwargs.get("attention_mask")), store_of(kwargs.get("attention_mask"))
        fits = (
            self.enabled
            and (cu_seq_lens_q is not None or trees is not None or store is not None)
            and position_embeddings is not None
            and past_key_values is None
            and not args
            and hidden_states.shape[0] == 1
            and _has_kernels(hidden_states, self.get_parameter("input_layernorm.weight"), *position_embeddings)
        )
        original = self.original
        original.training = self.training  # train() and eval() do not reach it
        if not fits:
            answer: Tensor = original(
                hidden_states,
                *args,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                cu_seq_lens_q=cu_seq_lens_q,
                **kwargs,
            )
            return answer
        assert position_embeddings is not None
        rotary = (position_embeddings[0][0], position_embeddings[1][0])
        if store is not None:
            return self._run(hidden_states, rotary, store)
        spans: AttentionSpans | Boundaries
        if hidden_states.is_cuda:
            documents = cu_seq_lens_q if trees is None else trees
            assert documents is not None
            spans = Boundaries(self._heads, documents, self._window, kwargs.get("max_length_q"))
        elif trees is not None:
            spans = AttentionSpans.of_trees(trees, self._heads, window=self._window)
        else:
            assert cu_seq_lens_q is not None
            spans = AttentionSpans.of(cu_seq_lens_q, self._heads, causal=True, window=self._window)
        if self.training and self.gradient_checkpointing:
            again: Callable[..., Any] = checkpoint
            recomputed: Tensor = again(
                self._run,
                hidden_states,
                rotary,
                spans,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), as_now(self)),
            )
            return recomputed
        return self._run(hidden_states, rotary, spans)

    def _run(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], spans: AttentionSpans | Boundaries | KeyStore
    ) -> Tensor:
        if isinstance(spans, KeyStore):
            return self._run_stored(hidden_states, rotary, spans)
        first, second = self._halves()
        return mlp_half(attention_half(hidden_states, first, rotary, spans), second)

    def _run_stored(self, h: Tensor, rotary: tuple[Tensor, Tensor], keys: KeyStore) -> Tensor:
        linears = (getattr(getattr(self, part), name) for part, names in _LINEARS.items() for name in names)
        num_bytes = sum(each.in_features * each.out_features for each in linears) * h.element_size()
        prepared = keys.prepare(self, num_bytes, lambda: self._prepare(h))
        if prepared is not None:
            return prepared(h, rotary, keys)
        first, second = self._halves()
        return mlp_half(attend_stored(h, first, rotary, self._heads, keys, self._window), second)

    def _prepare(self, h: Tensor) -> StoredLayer | None:
        """Returns the layer prepared for many passes over hidden states like these; None if it cannot be."""
        first, second = self._halves()
        projections = (first.q, first.k, first.v, first.o, second.gate, second.up, second.down)
        if not can_prepare(projections, h):
            return None
        return StoredLayer(first, second, self._heads, self._window, h.dtype)

    def _halves(self) -> tuple[Attention, Mlp]:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        first = Attention(
            norm=_norm(self.input_layernorm),
            q=_projection(attention.q_proj),
            k=_projection(attention.k_proj),
            v=_projection(attention.v_proj),
            o=_projection(attention.o_proj),
            scores=self._scores,
            q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        )
        second = Mlp(
            norm=_norm(self.post_attention_layernorm),
            gate=_projection(mlp.gate_proj),
            up=_projection(mlp.up_proj),
            down=_projection(mlp.down_proj),
        )
        return first, second


def _has_kernels(*tensors: Tensor) -> bool:
    return supported(*tensors) or on_gpu(*tensors)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _projection(module: nn.Module) -> Projection:
    inputs: SquaredInputs | None = getattr(module, "squared_inputs", None)
    if isinstance(module, LoraLinear):
        return replace(module.projection(), inputs=inputs)
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return Projection(lambda dtype: _dense(module, dtype), bias, None, None, inputs=inputs)


def _dense(module: nn.Module, dtype: torch.dtype) -> Tensor:
    if isinstance(module, QuantLinear):
        return module.decode(dtype, module.scratch(dtype))
    return module.get_parameter("weight").detach().to(dtype)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_decoder_layer(layer: nn.Module) -> bool:
    """Returns whether a layer is one of the repeated layers of a transformers model, which can be recomputed."""
    return hasattr(layer, "gradient_checkpointing") or type(layer).__name__.endswith("DecoderLayer")


def _obstacle(layer: Any, device: torch.device) -> str | None:
    """Returns why a layer cannot be fused, or None."""
    if _name(layer) not in _KNOWN:
        return f"{type(layer).__name__} is not among the fused architectures"
    if "SiLU" not in type(layer.mlp.act_fn).__name__:
        return f"its activation is {type(layer.mlp.act_fn).__name__}, not SiLU"
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
        return "a hook is registered on one of its modules"
    obstacles = (module.obstacle for module in layer.modules() if isinstance(module, Adapted))
    if (obstacle := next(filter(None, obstacles), None)) is not None:
        return obstacle
    of_adapters = own_parameters(layer)
    frozen = [p for p in layer.parameters() if id(p) not in of_adapters]
    if any(p.requires_grad for p in frozen):
        return "weights other than its adapters are trained"
    dtypes = {p.dtype for p in frozen if p.is_floating_point()}
    if len(dtypes) != 1 or dtypes - {torch.float32, torch.bfloat16}:
        return f"its weights are {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    if device.type != "cpu" and not (device.type == "cuda" and importlib.util.find_spec("triton") is not None):
        return "its device has no kernels for it"
    for part, names in _LINEARS.items():
        for name in names:
            module = layer.get_submodule(part).get_submodule(name)
            module = module.base if isinstance(module, LoraLinear) else module
            if type(module) is not nn.Linear and not isinstance(module, QuantLinear):
                return f"its {name} is a {type(module).__name__}"
    return None


def disagreement(layer: nn.Module, fused: FusedLayer) -> str | None:
    """Compares outputs and gradients on two short random documents.

    Returns:
        What differs, or None if the layers agree.
    """
    weight = layer.get_parameter("input_layernorm.weight")
    dtype, device = weight.dtype, weight.device
    generator = torch.Generator().manual_seed(0)
    lengths, size = (17, 31), fused._heads.size
    h = torch.randn(1, sum(lengths), len(weight), generator=generator).to(device, dtype)
    grad = torch.randn(h.shape, generator=generator).to(device, dtype)
    angles = torch.rand(1, sum(lengths), size // 2, generator=generator).repeat(1, 1, 2) * 6
    call = {
        "position_embeddings": (angles.cos().to(device, dtype), angles.sin().to(device, dtype)),
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        "cu_seq_lens_q": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device),
    }
    call["cu_seq_lens_k"] = call["cu_seq_lens_q"]
    was_training, was_enabled = layer.training, fused.enabled
    layer.eval()
    fused.eval()
    fused.enabled = True
    try:
        # Not `fused(...)`: the hooks of a sharded layer belong to a pass through the complete model.
        ours, theirs = (_answer_and_gradients(fused, run, h, grad, call) for run in (fused.forward, layer))
    except (RuntimeError, TypeError, AttributeError) as failure:
        return f"the comparison with the original layer failed: {type(failure).__name__}: {failure}"
    finally:
        layer.train(was_training)
        fused.train(was_training)
        fused.enabled = was_enabled
    for name, expected in theirs.items():
        size_of = expected.float().norm().item()
        error = (ours[name].float() - expected.float()).norm().item()
        if not error <= _TOLERANCE[dtype] * max(size_of, 1e-6):
            return f"its {name} differs from that of the original layer by {error / max(size_of, 1e-6):.1e}"
    return None


def _answer_and_gradients(
    module: nn.Module, run: Callable[..., Tensor], h: Tensor, grad: Tensor, call: dict[str, Any]
) -> dict[str, Tensor]:
    leaf = h.clone().requires_grad_()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad and ".roles." not in name}
    with torch.enable_grad():
        answer = run(leaf, **call)
        gradients = torch.autograd.grad(answer, [leaf, *trained.values()], grad)
    return {"answer": answer.detach(), "gradient": gradients[0]} | dict(zip(trained, gradients[1:], strict=True))
