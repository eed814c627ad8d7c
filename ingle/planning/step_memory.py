"""The memory of one training step on one device, moment by moment.

A step is played through layer by layer: forward, loss, backward, optimizer. At each moment the bytes that are alive are
added up; the largest sum is the peak. What is alive throughout (weights, adapters, optimizer states) is added by
:mod:`ingle.planning.memory`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ingle.config.policy import Distill, OnlineDpo, PolicyGradient
from ingle.config.preferences import PairConfig
from ingle.config.run import Run
from ingle.planning.activations import Operation, Tapes, backward_peak, forward_peak, saved_bytes
from ingle.planning.shape import LayerShape

#: Logits of one chunk of the loss, and the multiple of its rows, as in :mod:`ingle.kernels.layers.token_logps`.
_CHUNK_LOGITS, _ROW_TILE = 1 << 24, 64
#: Bytes per logit of float32 copies: of the logits, their logarithms of probabilities, probabilities and products; and
#: of a divergence, where each of two distributions, their mixture and ratios have some.
_STATISTICS_BYTES, _DIVERGENCE_BYTES = 16, 36
#: Bytes per token of shifted labels, and of the rows and targets that have one.
_LABEL_BYTES = 40


def loss_chunk(run: Run, dtype_bytes: int, on_gpu: bool) -> tuple[int, float]:
    """Returns the logits of a chunk of the loss, and the bytes of each.

    A cross-entropy overwrites its logits. Figures of the whole distribution need float32 copies of them on a GPU, and a
    divergence needs the logits of two models and copies of both.
    """
    if isinstance(run.objective, Distill) or getattr(run.objective, "loss", "") in ("tdpo1", "tdpo2"):
        return _CHUNK_LOGITS // 4, 2 * dtype_bytes + _DIVERGENCE_BYTES
    describes = isinstance(run.objective, PolicyGradient | OnlineDpo | PairConfig)
    return _CHUNK_LOGITS, dtype_bytes + _STATISTICS_BYTES * (describes and on_gpu)


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes that are alive at one moment of a step.

    Attributes:
        activations: Saved activations, temporary results, and buffers of the loss.
        gradients: Gradients of trained parameters.
        gathered: Weights gathered from other ranks, or copied from host memory.
    """

    activations: float
    gradients: float = 0.0
    gathered: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return self.activations + self.gradients + self.gathered


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers of one kind, as a step sees each of them.

    Attributes:
        layer: The kind.
        tape: Operations of one layer.
        gathered: Bytes of its weights that are gathered when it is used.
        gradients: Bytes of the gradients that a layer leaves behind on this device.
        pending: Bytes of its gradients before they are reduced, or added to those of float32 masters.
        reducing: Bytes that a reduction over ranks reads, which exist until the next layer has been reduced.
        largest: Bytes of its largest gradient while it is computed.
    """

    layer: LayerShape
    tape: tuple[Operation, ...]
    gathered: float = 0.0
    gradients: float = 0.0
    pending: float = 0.0
    reducing: float = 0.0
    largest: float = 0.0


@dataclass(frozen=True, slots=True)
class Ends:
    """Embedding and head, as a step sees them.

    Attributes:
        embedding_parameters: Parameters of the embedding.
        head_parameters: Parameters of the head.
        embedding_trained: Whether the embedding is trained.
        head_trained: Whether the head is trained.
        tied: Whether they share a weight.
        embedding_gathered: Bytes of the embedding when it is gathered.
        head_gathered: Bytes of the head when it is gathered.
        gradient_bytes: Bytes per parameter of a gradient that stays on this device.
    """

    embedding_parameters: int
    head_parameters: int
    embedding_trained: bool
    head_trained: bool
    tied: bool
    embedding_gathered: float = 0.0
    head_gathered: float = 0.0
    gradient_bytes: float = 4.0


@dataclass(frozen=True, slots=True)
class Step:
    """The last micro-batch of a step.

    Attributes:
        tapes: The rules of the model.
        units: Its layers by kind.
        ends: Its embedding and head.
        tokens: Tokens of the micro-batch.
        recompute: Whether layers are recomputed.
        offload_activations: Whether saved activations wait in host memory.
        keeps_gathered: Whether gathered weights stay until the backward pass (ZeRO 1 and 2).
        earlier_gradients: Bytes of gradients that earlier micro-batches have left behind.
        summed: Bytes that the sum over ranks at the end of the step needs, with the gradients of a step (DDP).
        trunks: Forward passes of the layers that one loss reads: that of a policy, and that of its value function.
        companion_bytes: Bytes of the hidden states of other models, which the loss reads.
        chunk: Logits that exist at once, and the bytes of each.
    """

    tapes: Tapes
    units: tuple[Unit, ...]
    ends: Ends
    tokens: int
    recompute: bool = False
    offload_activations: bool = False
    keeps_gathered: bool = False
    earlier_gradients: float = 0.0
    summed: float = 0.0
    trunks: int = 1
    companion_bytes: float = 0.0
    chunk: tuple[int, float] | None = None

    def peak(self) -> Moment:
        """Returns the moment at which most bytes are alive."""
        return max(self.moments(), key=lambda moment: moment.total)

    def moments(self) -> Iterator[Moment]:
        """Yields the moments of the step that can be its peak.

        FSDP gathers into a buffer and copies the weights out of it. In the forward pass it keeps the buffer until the
        next unit is gathered; in the backward pass it gathers the next unit while the current one computes.
        """
        width = self._width()
        positions = 2 * self.tapes.dtype_bytes * self.tokens * max(unit.layer.head_dim for unit in self.units)
        live, earlier = positions + width + self.companion_bytes, self.earlier_gradients
        held = self.ends.embedding_gathered * self.keeps_gathered
        yield Moment(live, earlier, 2 * self.ends.embedding_gathered)
        kept = [width if self.recompute else saved_bytes(unit.tape) for unit in self.units]
        for unit, saved in zip(self.units, kept, strict=True):
            kept_here = 2 * saved if self.offload_activations else saved * unit.layer.count * unit.layer.uses
            live += self.trunks * kept_here
            transient = max((op.saved + op.forward for op in unit.tape), default=0.0)
            needed = transient if self.recompute else forward_peak(unit.tape) - saved_bytes(unit.tape)
            held += unit.gathered * unit.layer.count * self.keeps_gathered
            gathered = held + unit.gathered * (1 if self.keeps_gathered else 2)
            yield Moment(live + needed + width, earlier, gathered)
        norm = self.tapes.final_norm(self.tokens)
        live += saved_bytes(norm)
        yield from self._loss(live + width, earlier, held)
        gradients = earlier + self._head_gradient()
        nearest = self.units[-1]
        yield Moment(live + backward_peak(norm) - saved_bytes(norm), gradients, held or nearest.gathered)
        live -= saved_bytes(norm)
        reducing = 0.0
        for unit, saved in zip(reversed(self.units), reversed(kept), strict=True):
            peak = backward_peak(unit.tape) - (0 if self.recompute else saved_bytes(unit.tape))
            added = 0.0 if earlier else unit.gradients
            for index in reversed(range(unit.layer.count * unit.layer.uses)):
                is_first = unit is self.units[0] and index == 0  # the next unit is the embedding
                gathered = held or unit.gathered + (self.ends.embedding_gathered if is_first else unit.gathered)
                yield Moment(live + width + peak, gradients + reducing + unit.largest, gathered)
                live -= 0 if self.offload_activations else saved
                held -= unit.gathered * self.keeps_gathered
                reducing = unit.reducing
                yield Moment(live + width, gradients + unit.pending + reducing + added, held or unit.gathered)
                gradients += added if index % unit.layer.uses == 0 else 0.0
        yield from self._end(live + width, gradients, reducing)

    def _end(self, live: float, gradients: float, reducing: float) -> Iterator[Moment]:
        """Yields the moments after the first layer's backward pass."""
        ends = self.ends
        if ends.embedding_trained:
            size, b = ends.embedding_parameters, self.tapes.dtype_bytes
            dense = 0 if ends.tied else b  # of a tied weight, the gradient through the head is there already
            added = size * ends.gradient_bytes * (not self.earlier_gradients)
            yield Moment(live, gradients + reducing + size * dense + added, ends.embedding_gathered)
            if self.units[-1].reducing:
                yield Moment(live, gradients + size * (b + 4) + added)
            gradients += added
        if self.summed:
            yield Moment(0.0, self.summed)

    def _width(self) -> float:
        """Returns the bytes of the residual stream."""
        return self.tapes.dtype_bytes * self.tapes.shape.hidden_size * self.tokens

    def _head_gradient(self) -> float:
        """Returns what the head's backward pass leaves: of a tied weight, a part that waits for the embedding's."""
        if not self.ends.head_trained:
            return 0.0
        if self.ends.tied and self.ends.embedding_trained:
            return float(self.ends.head_parameters * self.tapes.dtype_bytes)
        return 0.0 if self.earlier_gradients else self.ends.head_parameters * self.ends.gradient_bytes

    def _loss(self, live: float, gradients: float, held: float) -> Iterator[Moment]:
        """Yields the moments of the loss; ``live`` includes the hidden states.

        The gradient of the hidden states is computed with the loss, chunk by chunk; likewise that of a trained head, in
        float32.
        """
        shape, b, ends = self.tapes.shape, self.tapes.dtype_bytes, self.ends
        vocab = max(1, shape.vocab_size)
        num_logits, logit_bytes = self.chunk or (_CHUNK_LOGITS, b)
        rows = min(self.tokens, max(num_logits // vocab // _ROW_TILE * _ROW_TILE, _ROW_TILE))
        ids = _LABEL_BYTES * self.tokens
        logits = rows * (logit_bytes * vocab + 2 * b * shape.hidden_size + 12)
        trained = ends.head_parameters * ends.head_trained
        width = self._width()
        yield Moment(live + ids + width + logits + trained * (4 + b), gradients, held + 2 * ends.head_gathered)
        scaled = trained * (8 + b * (b < 4))
        used = ends.head_gathered if ends.head_trained else 0.0  # the gradient is there already
        yield Moment(live + ids + 2 * width + scaled, gradients, held + used)
