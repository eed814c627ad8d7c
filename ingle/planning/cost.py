"""Predicts the time of a step: operations, bytes moved within and between devices, and what of it overlaps.

A step is a sequence of micro-batches. In each of them, every layer is computed, decoded from its format, gathered from
the other ranks and copied from host memory as the strategy requires. Transfers run while the layer before computes, so
a pass takes the longer of the two, and the first layer's transfer has nothing to hide behind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ingle.config.adapter_kinds import PrefixAdapter, PromptAdapter
from ingle.config.objective import Mlm
from ingle.config.policy import OnlineDpo, PolicyGradient
from ingle.config.preference_rules import has_reference
from ingle.config.preferences import Bco, Cpo, Dpo, Kto, Orpo, Simpo
from ingle.config.run import Run
from ingle.planning.activations import Tapes
from ingle.planning.adapter_cost import allows_fused
from ingle.planning.companions import value_rank
from ingle.planning.devices import Device
from ingle.planning.memory import trainable_parameters
from ingle.planning.shape import DataShape, LayerShape, ModelShape
from ingle.planning.strategy import Strategy
from ingle.planning.virtual_tokens import num_added_keys, with_virtual_tokens

#: Share of the peak operations that a training step reaches with large micro-batches, by class of device: calibrated
#: with published runs (fsdp_qlora on 3090, 4090 and A100; torchtune on 4090; torchtitan on H100). Faster tensor units
#: wait longer for memory between products. Of a CPU, the share that its matrix products reach: what is between them is
#: counted by itself, and is most of the time of a small model.
_EFFICIENCY = {"apple": 0.5, "cpu": 0.85}
_EFFICIENCY_BY_FLOPS = ((200e12, 0.62), (400e12, 0.57), (float("inf"), 0.36))
#: Share of a link's or memory's nominal rate that transfers reach.
_LINK_EFFICIENCY, _MEMORY_EFFICIENCY = 0.7, 0.75
#: Bytes per second between two machines: 100 Gbit/s.
_NETWORK = 12.5e9
#: Tokens in a micro-batch with which a device reaches half of its efficiency.
_HALF_TOKENS = {"cuda": 128, "rocm": 128, "apple": 64, "cpu": 8}
#: Time to start the operations of a layer in one pass.
_LAUNCH_S = {"cuda": 3e-4, "rocm": 3e-4, "apple": 5e-4, "cpu": 3e-3}
#: Time of a step that does not depend on its size: batches, the optimizer's loop, agreement of ranks.
_STEP_S = 5e-3
#: Bytes that AdamW reads and writes per trained parameter: float32 weight, gradient and two states.
_OPTIMIZER_BYTES = 28
#: Seconds of a CPU core per element that an operation between matrix products reads or writes (norms, activations,
#: rotary positions, attention, softmax). Measured in processor time: bfloat16 and float32 take equally long, so between
#: 4 and 12 layers of widths from 256 to 1,024 fit this number, and so do 3 ms for the calls of a fused layer's pass.
_ELEMENT_S = 1.6e-9
#: Weights that a CPU core decodes per second.
_CPU_DECODE_PER_CORE = 2e9


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted time of an optimizer step.

    Attributes:
        step_s: Seconds per step.
        compute_s: Seconds of computation in it, per device.
        transfer_s: Seconds of transfers between devices and with the host, overlapped or not.
        flops: Floating-point operations of a step over all devices, recomputation included.
        moved_bytes: Bytes that a device receives from others and from the host in a step.
    """

    step_s: float
    compute_s: float
    transfer_s: float
    flops: float
    moved_bytes: float


def flops_per_token(run: Run, model: ModelShape, *, recompute: bool, context: float = 0.0) -> float:
    """Returns floating-point operations per token.

    A weight costs 2 in the forward pass, 2 for the gradient of the input, and 2 for its own gradient if it is trained.
    Recomputing repeats the forward pass of the layers. The scores of attention cost 4 per pair and feature in the
    forward pass, and twice that in the backward pass. Losses of log-probabilities compute logits again in the backward
    pass. A reference, mismatched answers and a teacher cost forward passes; a value function has layers of its own.

    Args:
        run: The run.
        model: Its model.
        recompute: Whether activations are recomputed.
        context: Tokens that a token attends to on average.
    """
    is_full = run.adapter.kind == "none"
    inner = sum(lin.num_weights * lin.active for lin in model.linears)
    head = model.hidden_size * model.vocab_size * predicted_share(run)
    passes = ((6 if is_full else 4) + (2 if recompute else 0)) * num_trunks(run)
    head_passes = (6 if is_full else 4) + 2 * _computes_logits_again(run)
    is_virtual = isinstance(run.adapter, PrefixAdapter | PromptAdapter)  # computed once for all tokens
    trained = model.saved_parameters if is_virtual else trainable_parameters(run, model)
    adapters = 0 if is_full else (6 + (2 if recompute else 0)) * trained
    context += num_added_keys(run)
    scores = sum(layer.count * layer.uses * _pairs(layer, context) for layer in model.layers)
    own = passes * inner + head_passes * head + adapters + (3 + recompute) * num_trunks(run) * scores
    forward = num_forward_passes(run) * (2 * (inner + head) + scores)
    return float(own + forward + 2 * sum(each.active_parameters for each in model.companions))


def num_trunks(run: Run) -> int:
    """Returns how many passes through the layers have a backward pass: one more for PPO's value function."""
    return 2 if value_rank(run) else 1


def num_forward_passes(run: Run) -> int:
    """Returns how many passes of a step have no backward pass: those of a reference, and of mismatched answers."""
    mismatched = 2 if isinstance(run.objective, Kto) and run.objective.baseline != "none" else 0
    return int(has_reference(run) or isinstance(run.objective, OnlineDpo)) + mismatched


def _computes_logits_again(run: Run) -> bool:
    """Returns whether the loss reads log-probabilities; that of a cross-entropy computes the gradient with them."""
    return isinstance(run.objective, Dpo | Simpo | Cpo | Orpo | Kto | Bco | PolicyGradient | OnlineDpo)


def predicted_share(run: Run) -> float:
    """Returns the part of the positions whose logits are computed."""
    return run.objective.rate if isinstance(run.objective, Mlm) else 1.0


def mean_context(data: DataShape) -> float:
    """Returns how many tokens a token attends to on average: half of its document."""
    document = data.mean_document or data.longest_document or data.longest
    return min(document, data.longest) / 2


def _pairs(layer: LayerShape, context: float) -> float:
    """Returns operations of attention per token in a forward pass of a layer."""
    if layer.mixer == "recurrent":
        return 0.0
    span = min(context, layer.window) if layer.window else context
    span = 2 * span if layer.mixer == "bidirectional_attention" else span
    return 4.0 * span * layer.num_heads * layer.head_dim


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes and moves, whatever executes it.

    Attributes:
        flops: Operations per token without and with recomputation.
        tokens: Tokens of a sequence on average.
        decoded: Weights that are decoded from a format.
        stored_bytes: Bytes of those weights.
        base_bytes: Bytes of all weights.
        trained: Trained parameters.
        num_layers: Layers.
        dtype_bytes: Bytes of the compute dtype.
        elements: Elements per token that the operations between matrix products read and write, without and with
            recomputation.
    """

    flops: tuple[float, float]
    tokens: float
    decoded: float
    stored_bytes: float
    base_bytes: float
    trained: int
    num_layers: int
    dtype_bytes: int
    elements: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, run: Run, model: ModelShape, data: DataShape, dtype_bytes: int) -> Work:
        """Counts the work of a run."""
        data = with_virtual_tokens(run, data)
        decoded = stored = plain = 0.0
        for lin in model.linears:
            bits = lin.bits_per_weight or run.base.bits_per_weight(lin.in_features, dtype_bits=8 * dtype_bytes)
            weights = lin.num_weights * lin.count
            if bits < 8 * dtype_bytes:
                decoded, stored = decoded + weights, stored + weights * bits / 8
            else:
                plain += weights * bits / 8
        context = mean_context(data)
        return cls(
            flops=(
                flops_per_token(run, model, recompute=False, context=context),
                flops_per_token(run, model, recompute=True, context=context),
            ),
            tokens=data.num_tokens / max(1, data.num_sequences),
            decoded=decoded,
            stored_bytes=stored,
            base_bytes=stored + plain + model.other_parameters * dtype_bytes,
            trained=trainable_parameters(run, model),
            num_layers=model.num_layers,
            dtype_bytes=dtype_bytes,
            elements=_elements(run, model, dtype_bytes),
        )


def _elements(run: Run, model: ModelShape, dtype_bytes: int) -> tuple[float, float]:
    """Returns :attr:`Work.elements`: what the tapes of the layers count, and the logits."""
    tapes = Tapes(run, model, dtype_bytes, model.fused and allows_fused(run))
    forward = backward = 0.0
    for layer in model.layers:
        times = layer.count * layer.uses / dtype_bytes
        for operation in tapes.layer(layer, 1):
            forward += times * (operation.saved + operation.forward)
            backward += times * operation.backward
    logits = model.vocab_size * predicted_share(run)
    own = num_trunks(run) * (forward + backward) + (1 + _computes_logits_again(run)) * logits
    more = num_forward_passes(run) * (forward + logits)
    return own + more, own + more + num_trunks(run) * forward


def predict(
    work: Work, strategy: Strategy, device: Device, activation_bytes: int, *, local_world_size: int | None = None
) -> Cost:
    """Predicts the time of a step.

    Args:
        work: The work of the run.
        strategy: How the ranks share it.
        device: The device of each rank.
        activation_bytes: Saved activations of a micro-batch, which ``offload_activations`` moves.
        local_world_size: Ranks on each machine; all of them if None.
    """
    local = local_world_size or strategy.world_size
    between = _reached(device, strategy.shard_size <= local)
    tokens = strategy.micro_batch_size * work.tokens
    flops = work.flops[strategy.recompute] * tokens
    filled = tokens / (tokens + _HALF_TOKENS[device.kind])
    products = flops / (device.flops(work.dtype_bytes) * efficiency(device, work.dtype_bytes) * filled)
    passes = 2 + strategy.recompute
    launch = work.num_layers * passes * _LAUNCH_S[device.kind]
    between_products = 0.0
    if device.kind == "cpu":  # those of a GPU are part of its efficiency
        between_products = tokens * work.elements[strategy.recompute] * _ELEMENT_S / device.cores
    compute = products + between_products + launch + passes * _decode_s(work, device)
    gathered = _gathered_bytes(strategy, work.base_bytes)
    copied = _copied_bytes(strategy, work.base_bytes, activation_bytes)
    transfer = _transfer_s(gathered, copied, replace(device, interconnect=between))
    exposed = transfer / max(1, 2 * work.num_layers)
    reduced = _reduced_bytes(strategy, 4.0 * work.trained)
    share = work.trained / strategy.shard_size if strategy.shards_optimizer else work.trained
    update = share * _OPTIMIZER_BYTES / (device.bandwidth * _MEMORY_EFFICIENCY)
    reduce_s = reduced / (_reached(device, strategy.world_size <= local) * _LINK_EFFICIENCY)
    times = strategy.grad_accum_steps
    return Cost(
        step_s=times * (max(compute, transfer) + exposed) + reduce_s + update + _STEP_S,
        compute_s=times * compute + update,
        transfer_s=times * transfer + reduce_s,
        flops=flops * times * strategy.world_size,
        moved_bytes=times * (gathered + copied) + reduced,
    )


def efficiency(device: Device, dtype_bytes: int) -> float:
    """Returns the share of the peak operations that large micro-batches reach."""
    if device.is_measured:
        return 0.7  # of a measured product, which is itself below the peak
    found = _EFFICIENCY.get(device.kind)
    if found is not None:
        return found
    return next(share for limit, share in _EFFICIENCY_BY_FLOPS if device.flops(dtype_bytes) < limit)


def _decode_s(work: Work, device: Device) -> float:
    """Returns the time to decode all quantized weights once."""
    if device.decode_weights_per_s is not None:
        return work.decoded / device.decode_weights_per_s
    if device.kind == "cpu":
        return work.decoded / (_CPU_DECODE_PER_CORE * device.cores)
    # Codes are read, weights are written and then read again by the product.
    return (work.stored_bytes + 2 * work.decoded * work.dtype_bytes) / (device.bandwidth * _MEMORY_EFFICIENCY)


def _transfer_s(gathered: float, copied: float, device: Device) -> float:
    """Returns the time of transfers of a micro-batch; gathers and copies share a link if there is only one."""
    over_host = copied / (device.host_link * _LINK_EFFICIENCY)
    over_devices = gathered / (device.interconnect * _LINK_EFFICIENCY)
    return over_host + over_devices if device.interconnect == device.host_link else max(over_host, over_devices)


def _reached(device: Device, same_machine: bool) -> float:
    """Returns the bytes per second between two ranks."""
    return device.interconnect if same_machine else min(device.interconnect, _NETWORK)


def _gathered_bytes(strategy: Strategy, base: float) -> float:
    """Returns the bytes that a rank receives from others in a micro-batch, forward and backward."""
    if not strategy.shards_base:
        return 0.0
    return 2 * base * (strategy.shard_size - 1) / strategy.shard_size


def _copied_bytes(strategy: Strategy, base: float, activation_bytes: int) -> float:
    """Returns the bytes that a rank copies from and to host memory in a micro-batch."""
    own = base / strategy.shard_size if strategy.shards_base else base
    weights = 2 * own if strategy.offload else 0.0
    return weights + (2 * activation_bytes if strategy.offload_activations else 0.0)


def _reduced_bytes(strategy: Strategy, gradients: float) -> float:
    """Returns the bytes of gradients, and of updated weights, that a rank exchanges in a step."""
    world = strategy.world_size
    if world == 1:
        return 0.0
    once = 2 * gradients * (world - 1) / world
    if strategy.kind in ("zero2", "zero3", "hsdp"):  # reduced in every micro-batch, gathered once
        return once / 2 * (strategy.grad_accum_steps + 1)
    return once
