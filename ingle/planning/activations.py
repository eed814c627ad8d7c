"""What a layer keeps between its forward and backward pass, and what it needs while it runs, from its operations.

Each layer is a *tape*: its operations in order, with the bytes that each saves for the backward pass and the bytes that
exist only while it runs. The rules are those of PyTorch's autograd for the modules of transformers, and of
:mod:`ingle.kernels.layers` for fused layers; nothing is fitted. Sizes in the rules are bytes per token.

Legend: b bytes of the compute dtype, H hidden, I intermediate, Q query width, K key/value width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingle.config.run import Run
from ingle.planning.adapter_cost import group_size, kept_features
from ingle.planning.shape import LayerShape, LinearShape, ModelShape
from ingle.planning.virtual_tokens import num_added_keys

#: Outputs that an activation function saves for its backward pass, by the name in ``config.json``; others save one.
#: ``gelu_new`` is written out in eight operators, four of which save a tensor.
_SAVED_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 5, "gelu_python": 4, "gelu_pytorch_tanh": 1, "quick_gelu": 2}
#: Names of the layers that end attention, or the feed-forward part.
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "o", "proj")
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2", "wo", "fc_out", "out_proj", "proj")
#: float32 tensors in the backward pass of an RMSNorm that is made of operators: two products, a quotient, a power and
#: its product.
_NORM_TEMPORARIES = 5


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a tape.

    Attributes:
        saved: Bytes from its forward to its backward pass.
        forward: Bytes that exist only while it runs forward, results included.
        backward: Bytes that exist only while it runs backward, gradients of its inputs and outputs included.
    """

    saved: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    def scaled(self, factor: float) -> Operation:
        """Returns the operation over ``factor`` times as many tokens."""
        return Operation(self.saved * factor, self.forward * factor, self.backward * factor)


def saved_bytes(tape: Sequence[Operation]) -> float:
    """Returns the bytes that a tape keeps after its forward pass."""
    return sum(operation.saved for operation in tape)


def forward_peak(tape: Sequence[Operation]) -> float:
    """Returns the most bytes that a forward pass needs at once, with what it keeps."""
    live = peak = 0.0
    for operation in tape:
        live += operation.saved
        peak = max(peak, live + operation.forward)
    return peak


def backward_peak(tape: Sequence[Operation]) -> float:
    """Returns the most bytes that a backward pass needs at once, with what the forward pass kept."""
    live, peak = saved_bytes(tape), 0.0
    for operation in reversed(tape):
        peak = max(peak, live + operation.backward)
        live -= operation.saved
    return peak


@dataclass(frozen=True, slots=True)
class Tapes:
    """Makes tapes for a run.

    Attributes:
        run: The run.
        shape: Its model.
        dtype_bytes: Bytes of the compute dtype.
        fused: Whether the layers are fused.
        on_gpu: Whether the device is a GPU.
    """

    run: Run
    shape: ModelShape
    dtype_bytes: int
    fused: bool = False
    on_gpu: bool = False

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained."""
        return self.run.adapter.kind == "none"

    def layer(self, layer: LayerShape, tokens: float) -> list[Operation]:
        """Returns the tape of one layer over ``tokens`` tokens."""
        tape = self._fused_layer(layer) if self.fused else self._layer(layer)
        return [operation.scaled(tokens) for operation in tape]

    def final_norm(self, tokens: float) -> list[Operation]:
        """Returns the tape of the norm after the last layer."""
        layer = self.shape.layers[-1]
        return [self._norm(layer, self.shape.hidden_size, residual=0).scaled(tokens)]

    # Operations of unfused layers.

    def _layer(self, layer: LayerShape) -> list[Operation]:
        attention = [lin for lin in layer.linears if _in_attention(lin)]
        rest = [lin for lin in layer.linears if not _in_attention(lin)]
        extra = self._norm(layer, self.shape.hidden_size)
        tape = [extra, *self._attention(layer, attention)]
        tape += [extra] * (layer.num_norms > 2) + [extra]
        tape += self._mlp(layer, rest)
        tape += [extra] * (layer.num_norms > 3)
        return tape if layer.num_norms > 1 else tape[:1] + [op for op in tape[1:] if op is not extra]

    def _norm(self, layer: LayerShape, width: float, residual: float | None = None) -> Operation:
        """A norm over ``width`` features; ``residual`` is the width of the gradient that passes it by."""
        b = self.dtype_bytes
        passing = b * (self.shape.hidden_size if residual is None else residual)
        if layer.norm == "layer":
            return Operation(b * width + 8, b * width, 2 * b * width + passing)
        weighted = b * width if self.trains_all else 0
        return Operation(4 * width + 4 + weighted, (8 + b) * width, _NORM_TEMPORARIES * 4 * width + passing)

    def _attention(self, layer: LayerShape, linears: Sequence[LinearShape]) -> list[Operation]:
        b, hidden = self.dtype_bytes, self.shape.hidden_size
        queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        outputs = [lin for lin in linears if _leaf(lin) in _OUTPUT and lin.out_features == hidden]
        inputs = [lin for lin in linears if lin not in outputs]
        tape = [self._linears(inputs, hidden)]
        if layer.head_norms:
            tape.append(self._norm(layer, queries))
            tape.append(self._norm(layer, keys))
        saved = b * (2 * queries + 2 * keys) + 4 * layer.num_heads
        rotated = 3 * b * queries
        if self.on_gpu:  # FlashAttention accumulates the gradient of the queries in float32
            backward = b * (2 * queries + 2 * keys) + 4 * queries
        else:
            backward = b * (3 * queries + 2 * keys) + 8 * keys
        tape.append(Operation(saved, rotated + b * hidden, backward + b * hidden))
        if added := num_added_keys(self.run):  # queries, scores, weights and results, in float32
            scores = 4 * layer.num_heads * added
            tape.append(Operation(4 * 2 * queries + 2 * scores + 4 * 4 * layer.num_heads, 2 * scores, 2 * scores))
        tape.append(self._linears(outputs, queries, saves_input=False))
        return tape

    def _mlp(self, layer: LayerShape, linears: Sequence[LinearShape]) -> list[Operation]:
        experts = [lin for lin in linears if lin.count > 1]
        dense = [lin for lin in linears if lin.count == 1 and lin.out_features not in (1, layer.num_experts)]
        tape = self._feed_forward(layer, dense) if dense else []
        if experts:
            tape += [Operation(12 * layer.num_experts)]  # the router's scores, in float32
            tape += [op.scaled(layer.experts_per_token) for op in self._feed_forward(layer, experts, routed=True)]
        return tape

    def _feed_forward(
        self, layer: LayerShape, linears: Sequence[LinearShape], *, routed: bool = False
    ) -> list[Operation]:
        b, hidden = self.dtype_bytes, self.shape.hidden_size
        downs = [lin for lin in linears if lin.in_features != hidden or _leaf(lin) in _DOWN]
        ups = [lin for lin in linears if lin not in downs]
        inner = downs[-1].in_features if downs else hidden
        tape = [self._linears(ups, hidden, copies_input=routed)]
        count = _SAVED_BY_ACTIVATION.get(layer.activation, 1)
        if layer.gated:
            tape.append(Operation(count * b * inner, b * inner, (3 * b) * inner + b * hidden))
            tape.append(Operation(2 * b * inner, b * inner, 3 * b * inner + b * hidden))
        else:
            tape.append(Operation(count * b * inner, 2 * b * inner, (2 + (count > 1)) * b * inner + b * hidden))
        tape.append(self._linears(downs, inner))
        if routed:  # outputs are multiplied by the router's weights, and those of quantized experts added in float32
            weighted = 4 * hidden if self._quantized(downs) else 0
            tape.append(Operation(b * hidden + weighted, 2 * b * hidden, 2 * b * hidden))
        return tape

    def _linears(
        self, linears: Sequence[LinearShape], width: float, *, saves_input: bool = True, copies_input: bool = False
    ) -> Operation:
        """Linear layers with one input of ``width`` features.

        Args:
            linears: The layers.
            width: Features of the input.
            saves_input: Whether the input is saved here, and not by the operation before.
            copies_input: Whether the input is copied for these layers.
        """
        b = self.dtype_bytes
        adapted = [lin for lin in linears if lin.adapted]
        keeps = saves_input and (self.trains_all or bool(adapted))
        kept = self._pooled(width) if adapted and not self.trains_all else width
        saved = b * kept * keeps + b * sum(kept_features(self.run, lin) for lin in adapted)
        outputs = b * sum(lin.out_features for lin in linears)
        inputs = b * width * min(2, max(1, len(linears)))
        hidden = b * self.shape.hidden_size  # the gradient of the residual stream
        return Operation(saved, outputs + b * width * (not keeps or copies_input), outputs + inputs + hidden)

    # Operations of fused layers.

    def _fused_layer(self, layer: LayerShape) -> list[Operation]:
        b, hidden = self.dtype_bytes, self.shape.hidden_size
        queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        inner = max((lin.in_features for lin in layer.linears if _leaf(lin) == "down_proj"), default=hidden)
        adapted = [lin for lin in layer.linears if lin.adapted]
        attended = b * sum(kept_features(self.run, lin) for lin in adapted if _in_attention(lin))
        fed = b * sum(kept_features(self.run, lin) for lin in adapted if not _in_attention(lin))
        normed = b * (queries + keys) + 4 * (layer.num_heads + layer.num_kv_heads) if layer.head_norms else 0
        if self.on_gpu:
            backward = b * (2 * queries + 2 * keys + hidden) + 4 * queries
        else:
            backward = b * (4 * queries + 2 * keys + 3 * hidden) + 8 * keys
        attention = Operation(
            saved=b * (hidden + 2 * queries + 2 * keys) + 4 + 4 * layer.num_heads + attended + normed,
            forward=b * (2 * hidden + 2 * queries + 2 * keys),
            backward=backward + attended,
        )
        mlp = Operation(
            saved=b * (hidden + 2 * inner) + 4 + fed,
            forward=b * (inner + 2 * hidden),
            backward=b * max(inner + hidden, 3 * hidden) + fed,
        )
        return [attention, mlp]

    def _quantized(self, linears: Sequence[LinearShape]) -> bool:
        own = any(lin.bits_per_weight not in (None, 8 * self.dtype_bytes) for lin in linears)
        return own or self.run.base.format != "none"

    def _pooled(self, width: float) -> float:
        """Returns the saved features of an adapter's input: QA-LoRA saves sums over groups."""
        return width / group_size(self.run)


def _leaf(linear: LinearShape) -> str:
    return linear.name.rpartition(".")[2]


def _in_attention(linear: LinearShape) -> bool:
    path = linear.name.lower()
    return "attn" in path or "attention" in path
