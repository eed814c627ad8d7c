"""Predicts the memory of a run on each device from its config and the shape of its model.

What exists throughout a step is counted: weights, adapters, optimizer states. The rest is found by playing a step
through (:mod:`ingle.planning.step_memory`), with what each operation saves (:mod:`ingle.planning.activations`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ingle.config.adapter import LoraAdapter, QaLoraAdapter
from ingle.config.base import base_section
from ingle.config.run import Run
from ingle.planning.activations import Tapes
from ingle.planning.adapter_cost import (
    allows_fused,
    own_parameters,
    parameters_in_layer,
    parameters_of,
    role_parameters,
)
from ingle.planning.companions import keeps_initial, reward_rank, subtracts, value_rank
from ingle.planning.rollout_memory import answers_bytes, sampling_bytes, scoring_bytes
from ingle.planning.shape import DataShape, LayerShape, LinearShape, ModelShape
from ingle.planning.step_memory import Ends, Step, Unit, loss_chunk
from ingle.planning.strategy import Strategy
from ingle.planning.update_rules import active_parameters, active_share, scratch_bytes, state_bytes
from ingle.planning.virtual_tokens import with_virtual_tokens

#: A GPU's context with its libraries, outside of PyTorch's allocator, and the workspaces of its matrix products.
_CONTEXT_BYTES = 512 << 20
_WORKSPACE_BYTES = 40 << 20
#: Scores in a tile of a CPU's attention.
_TILE_SCORES = 1 << 21

#: What a CPU run allocates after planning: kernels, and with bfloat16 the matrix products that oneDNN compiles for each
#: shape and caches. Measured; nearly the same for every model.
_CPU_KERNEL_BYTES = 40 << 20
_CPU_PRIMITIVE_BYTES = 200 << 20
#: Additional memory of the first run on a machine, which compiles the kernels: the compiler, and its data per kernel.
_COMPILER_BYTES = 20 << 20
_COMPILED_BYTES = 7 << 20
#: Bytes per token of a batch: ids, labels, positions, offsets; all micro-batches of a step exist at once.
_BATCH_BYTES_PER_TOKEN = 32
#: Share of the memory of sampling, or of a step if that is less, which a CPU's allocator cannot use for the other:
#: freed memory stays in the process, and the blocks of both have other sizes. Measured.
_GAPS = 0.5
#: Elements of the gradients that DDP adds over ranks at once, as in :mod:`ingle.parallel.gradients`.
_BUCKET = 1 << 25
#: Number of kernels: for attention and loss, for quantized weights, for layers fused with adapters.
_KERNELS, _QUANT_KERNELS, _FUSED_KERNELS = 6, 3, 5


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Predicted bytes on one device by purpose, at the peak of a step.

    Attributes:
        weights_bytes: The frozen base, or the weights that full fine-tuning trains; this rank's shard if sharded. Also
            models that run next to it: a teacher, or reward models.
        gather_bytes: Weights gathered from other ranks, or copied from host memory, for the layers in use.
        adapter_bytes: Adapters, those of a value function and of reward models included, and modules trained in full,
            with float32 masters and initial values.
        gradient_bytes: Gradients.
        optimizer_bytes: Optimizer states.
        activation_bytes: Saved activations, and buffers of the loss.
        overhead_bytes: Decoded weights, batches, kernels, the context of the device and of the allocator.
        evaluation_bytes: By how much the evaluation, or the sampling of answers, needs more than a step; among the
            ``activation_bytes``.
    """

    weights_bytes: int = 0
    gather_bytes: int = 0
    adapter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    overhead_bytes: int = 0
    evaluation_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Returns the bytes by name, without the total."""
        return {name: number for name, number in asdict(self).items() if name != "evaluation_bytes"}

    def allocated_bytes(self, *, on_gpu: bool) -> int:
        """Returns what the allocator counts during a step: on a GPU, all but the device's context."""
        return self.total_bytes - self.evaluation_bytes - (_CONTEXT_BYTES if on_gpu else 0)

    def to_dict(self) -> dict[str, int]:
        """Returns the total and the parts as plain data."""
        return {"total_bytes": self.total_bytes} | self.parts()


def per_device(
    run: Run,
    shape: ModelShape,
    data: DataShape,
    strategy: Strategy,
    *,
    dtype_bytes: int,
    on_gpu: bool,
    compiles_kernels: bool = False,
) -> MemoryParts:
    """Predicts the bytes on each device at the peak of a step, without what the process used before.

    Args:
        run: The run; its ``parallel`` section and micro-batch are those of ``strategy``.
        shape: Its model, with adapted linear layers counted.
        data: Its data.
        strategy: How the ranks share the run.
        dtype_bytes: Bytes of the compute dtype.
        on_gpu: Whether the device is a GPU.
        compiles_kernels: Whether this machine has yet to compile the CPU kernels.
    """
    data = with_virtual_tokens(run, data)
    return DeviceMemory(run, shape, data, strategy, dtype_bytes, on_gpu, compiles_kernels).parts()


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The arithmetic of :func:`per_device`."""

    run: Run
    shape: ModelShape
    data: DataShape
    strategy: Strategy
    dtype_bytes: int
    on_gpu: bool
    compiles_kernels: bool = False

    def parts(self) -> MemoryParts:
        """Returns the bytes by purpose at the peak."""
        peak = self.step().peak()
        everything = trainable_parameters(self.run, self.shape)
        trained = active_parameters(self.run, self.shape, everything) / self._trained_ranks
        gradients = min(trained * 4, peak.gradients + peak.activations)
        evaluation = max(0.0, self._evaluation() - peak.total)
        return MemoryParts(
            weights_bytes=round(self._weights()),
            gather_bytes=round(peak.gathered),
            adapter_bytes=round(self._masters() + self._copies()),
            gradient_bytes=round(gradients),
            optimizer_bytes=round(state_bytes(self.run, self.shape, everything, self._trained_ranks)),
            activation_bytes=round(peak.activations + peak.gradients - gradients + evaluation),
            overhead_bytes=round(self._scratch() + self._batch() + self._answers(peak.total) + self.fixed_bytes()),
            evaluation_bytes=round(evaluation),
        )

    @property
    def _full(self) -> bool:
        return self.run.adapter.kind == "none"

    @property
    def _base_ranks(self) -> int:
        """Ranks that share one copy of the frozen base."""
        return self.strategy.shard_size if self.strategy.shards_base else 1

    @property
    def _trained_ranks(self) -> int:
        """Ranks that share one copy of what is trained, its gradients and its optimizer states."""
        return self.strategy.shard_size if self.strategy.shards_optimizer and not self._offloads else 1

    @property
    def _offloads(self) -> bool:
        """Whether the frozen base is in host memory; what an adapter trains is then on every device."""
        return self.strategy.offload and not self._full

    def _trained_whole(self) -> int:
        """Parameters of the model itself that are trained."""
        return self.shape.num_parameters if self._full else self.shape.saved_parameters

    def _bits(self, lin: LinearShape) -> float:
        own = lin.bits_per_weight
        return own or self.run.base.bits_per_weight(lin.in_features, dtype_bits=8 * self.dtype_bytes)

    def _weights(self) -> float:
        """Weights of the model; if trained ones are sharded, their float32 masters stand in for them."""
        linears = sum(lin.num_weights * lin.count * self._bits(lin) / 8 for lin in self.shape.linears)
        weights = linears + self.shape.other_parameters * self.dtype_bytes
        merged = _merged_bytes(self.run, self.shape) + sum(each.weight_bytes for each in self.shape.companions)
        if not self.strategy.shards_optimizer:
            return weights + merged
        whole = self._trained_whole()
        frozen = weights - whole * self.dtype_bytes
        resting = 0 if self._offloads and self.on_gpu else frozen / self._base_ranks
        return resting + 4 * whole / self._trained_ranks + merged

    def _masters(self) -> float:
        """Adapters; float32 masters and initial values of what else is trained, of all that in a subspace."""
        whole, everything = self._trained_whole(), trainable_parameters(self.run, self.shape)
        adapters = 4 * (everything - whole)
        initial = 0 if self._full else 4 if self.strategy.shards_optimizer else self.dtype_bytes
        masters = 4 * (self.dtype_bytes < 4 and not self.strategy.shards_optimizer)
        if self.run.optim.rule.kind == "subspace":
            return 2 * adapters + (initial + self.dtype_bytes) * whole
        active = whole if not self._full else active_parameters(self.run, self.shape, whole)
        return (adapters + initial * whole + masters * active) / self._trained_ranks

    def _copies(self) -> float:
        """The values that training began with, where they are kept, and the adapters of reward models."""
        own = own_parameters(self.run, self.shape) if not self._full else 0
        kept = subtracts(self.run) + keeps_initial(self.run)
        return 4.0 * (own * kept + role_parameters(self.shape.linears, reward_rank(self.run)))

    def _tapes(self) -> Tapes:
        fused = self.shape.fused and allows_fused(self.run)
        return Tapes(self.run, self.shape, self.dtype_bytes, fused, self.on_gpu)

    def step(self) -> Step:
        """Returns the last micro-batch of a step."""
        run, shape, strategy = self.run, self.shape, self.strategy
        tapes = self._tapes()
        tokens = self.data.most_tokens(strategy.micro_batch_size)
        trained = 4.0 * active_parameters(run, shape, trainable_parameters(run, shape))
        ranks = 1 if strategy.kind == "zero1" else self._trained_ranks
        summed = 0.0
        if strategy.kind == "ddp":
            largest = shape.embedding_parameters if self._full else 0
            summed = trained + 4 * (max(min(_BUCKET, trained / 4), largest) + largest)
        units = tuple(self._unit(tapes, layer, tokens) for layer in shape.layers)
        states = sum(each.hidden_size for each in shape.companions)
        return Step(
            tapes,
            units,
            self._ends(),
            tokens,
            strategy.recompute,
            strategy.offload_activations,
            keeps_gathered=strategy.shards_optimizer and not strategy.shards_base,
            earlier_gradients=trained / ranks if strategy.grad_accum_steps > 1 else 0.0,
            summed=summed,
            trunks=2 if value_rank(run) else 1,
            companion_bytes=float(self.dtype_bytes * states * tokens),
            chunk=loss_chunk(run, self.dtype_bytes, self.on_gpu),
        )

    def _ends(self) -> Ends:
        shape, strategy = self.shape, self.strategy
        saved = getattr(self.run.adapter, "trainable_modules", ())
        head_trained = self._full or any("head" in name for name in saved)
        embedding_trained = self._full or any("embed" in name or "wte" in name for name in saved)
        head = shape.hidden_size * shape.vocab_size

        def gathered(parameters: int, trained: bool) -> int:
            is_sharded = strategy.shards_base or (strategy.shards_optimizer and trained)
            return parameters * self.dtype_bytes * is_sharded

        return Ends(
            embedding_parameters=shape.embedding_parameters,
            head_parameters=head,
            embedding_trained=embedding_trained,
            head_trained=head_trained,
            tied=shape.tied,
            embedding_gathered=gathered(shape.embedding_parameters, embedding_trained),
            head_gathered=gathered(head, head_trained),
            gradient_bytes=4.0 * (self.run.optim.rule.kind != "subspace") / self._trained_ranks,
        )

    def _unit(self, tapes: Tapes, layer: LayerShape, tokens: int) -> Unit:
        tape = tuple(tapes.layer(layer, tokens))
        strategy, b = self.strategy, self.dtype_bytes
        trained = layer.num_parameters if self._full else parameters_in_layer(self.run, self.shape, layer)
        largest = max((lin.num_weights for lin in layer.linears), default=0) if self._full else 0
        computed = b if self._full else 4  # adapters are float32
        gathered = 0.0
        if strategy.shards_base:
            linears = sum(lin.num_weights * lin.count * self._bits(lin) / 8 for lin in layer.linears)
            gathered = linears + layer.other_parameters * b + (0 if self._full or self._offloads else 4 * trained)
            if self._offloads:  # two units are gathered at a time, and the shard of one is copied from the host
                gathered *= 1 + 0.5 / self._base_ranks
        elif strategy.shards_optimizer:
            gathered = trained * computed
        is_reduced = self._trained_ranks > 1
        return Unit(
            layer,
            tape,
            gathered=gathered,
            gradients=4.0 * trained * active_share(self.run, self.shape) / self._trained_ranks,
            pending=float(computed * trained if is_reduced else b * largest),
            reducing=4.0 * trained if is_reduced else 0.0,
            largest=float(b * largest),
        )

    def _evaluation(self) -> float:
        """What answers to samples and those of an iteration take, with the weights that are gathered for them."""
        longest = self.data.longest_document or self.data.longest
        found = [self._sampling(), scoring_bytes(self.run, self.data, self._tapes())]
        if self.run.task is not None:
            found.append(self._generation(self.run.task.batch_size, longest + self.run.task.max_new_tokens))
        step = self.step()
        gathered = max(step.ends.head_gathered, *(unit.gathered for unit in step.units))
        return max(found) + 2 * gathered if max(found) else 0.0

    def _generation(self, batch_size: int, length: int) -> float:
        """The keys and values of a batch of answers, and its scores."""
        widths = sum(2 * layer.num_kv_heads * layer.head_dim * layer.count for layer in self.shape.layers)
        scores = (4 + self.dtype_bytes) * self.shape.vocab_size
        return batch_size * (length * widths * self.dtype_bytes + scores)

    def _scratch(self) -> float:
        """The buffer for decoded weights; there is one per thread, and a GPU's backward pass has its own thread."""
        quantized = [lin for lin in self.shape.linears if self._bits(lin) < 8 * self.dtype_bytes]
        largest = max((lin.num_weights for lin in quantized), default=0)
        return largest * self.dtype_bytes * (2 if self.on_gpu else 1) + scratch_bytes(self.run, self.shape)

    def _batch(self) -> float:
        sequences = self.strategy.micro_batch_size * self.strategy.grad_accum_steps
        return sequences * self.data.num_tokens / max(1, self.data.num_sequences) * _BATCH_BYTES_PER_TOKEN

    def _answers(self, step_bytes: float) -> float:
        """What a CPU run keeps of answers, and the gaps that sampling and steps leave each other."""
        if self.on_gpu:
            return 0.0
        gaps = _GAPS * min(step_bytes, self._sampling())
        return answers_bytes(self.run, self.data) + gaps

    def _sampling(self) -> float:
        return sampling_bytes(self.run, self.data, self._tapes(), self.strategy.world_size)

    def fixed_bytes(self) -> float:
        """Returns what does not depend on the model: kernels and their caches, or the context of a GPU."""
        if self.on_gpu:
            return _CONTEXT_BYTES + _WORKSPACE_BYTES
        quantized = any(self._bits(lin) < 8 * self.dtype_bytes for lin in self.shape.linears)
        count = _KERNELS + quantized * _QUANT_KERNELS + (not self._full) * _FUSED_KERNELS
        compiled = _COMPILER_BYTES + count * _COMPILED_BYTES if self.compiles_kernels else 0
        tiles = 3 * self.dtype_bytes * _TILE_SCORES
        return _CPU_KERNEL_BYTES + (_CPU_PRIMITIVE_BYTES if self.dtype_bytes == 2 else 0) + tiles + compiled


def trainable_parameters(run: Run, model: ModelShape) -> int:
    """Counts the trained parameters."""
    if run.adapter.kind == "none":
        return model.num_parameters
    return model.saved_parameters + parameters_of(run, model)


def _merged_bytes(run: Run, model: ModelShape) -> int:
    """Bytes of merged weights, which runs that train through the rounding of a merge keep in addition to the base."""
    adapter = run.adapter
    if isinstance(adapter, LoraAdapter) and adapter.merge_aware is not None:
        named = adapter.merge_aware.format
    elif isinstance(adapter, QaLoraAdapter) and adapter.train_rounding:
        named = None
    else:
        return 0
    target = run.base if named is None else base_section(named)
    bits = sum(lin.num_weights * lin.adapted * target.bits_per_weight(lin.in_features) for lin in model.linears)
    return round(bits / 8)
