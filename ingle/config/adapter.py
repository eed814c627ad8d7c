"""``adapter:`` the weights that are trained on top of the base."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from ingle.config.adapter_kinds import (
    Adapter,
    BitfitAdapter,
    BottleneckAdapter,
    Ia3Adapter,
    Patterns,
    PeftAdapter,
    PrefixAdapter,
    PromptAdapter,
)
from ingle.config.base import FormatName
from ingle.config.section import Section, Text, tagged

#: How A and B begin, see :class:`WeightAdapter`.
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"]
#: Those that subtract the change that they begin with, and those that read training data.
SUBTRACTING: frozenset[Init] = frozenset({"orthogonal", "pissa", "olora", "lora_ga"})
READS_DATA: frozenset[Init] = frozenset({"eva", "lora_ga"})

Rank = Annotated[int, Field(ge=1, le=65_536)]


class NoAdapter(Section):
    """Full fine-tuning: trains every weight of the model."""

    kind: Literal["none"]


class MergeAware(Section):
    """Trains the last part of a run through the rounding of the merge, so that the merge loses less.

    Each step quantizes ``W + scale * B A`` once and multiplies with ``decode(encode(W + scale * B A))``; the gradient
    ignores the rounding. Dropout is off in that part.

    Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432),
    section 4, the straight-through estimator.

    Attributes:
        format: Format of the merged weights. If null, the format of the base.
        fraction: Fraction of the run's steps, counted from its end.
    """

    format: FormatName | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.25

    def first_step(self, num_steps: int) -> int:
        """Returns the first step (1-based) that trains through the rounding, in a run of ``num_steps``."""
        return num_steps - math.ceil(self.fraction * num_steps) + 1


class _LowRank(Section):
    """Options that only low-rank adapters have.

    Attributes:
        rank: Rank of the update: rows of A and columns of B.
        rank_pattern: Other ranks, by patterns that match the end of a module's path as in ``target_modules``; the first
            one that matches decides.
        alpha: Numerator of the scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``. If null, 2 * rank,
            with the rank of each module.
        dropout: Fraction of the adapter's inputs that are set to zero in training.
        rslora: Use the rank-stabilized scale (Kalajdzievski 2023, arXiv 2312.03732).
        lora_plus_ratio: Learning rate of B divided by that of A (Hayou et al. 2024, arXiv 2402.12354); 1 is plain LoRA.
        target_modules: ``all-linear``, or patterns that match the end of a module's path (``q_proj``,
            ``layers.*.mlp.*``). ``all-linear`` excludes the output head and layers that PEFT could not read back.
            ``none`` trains no adapter, only ``trainable_modules`` and the head of a task on the frozen base.
    """

    kind: str
    rank: Rank = 16
    rank_pattern: dict[Text, Rank] = Field(default_factory=dict)
    alpha: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1_000_000)] = 1.0
    target_modules: Literal["all-linear", "none"] | Patterns = "all-linear"


class LowRankAdapter(Adapter, _LowRank):  # in this order, so that the options of every adapter come last
    """Options of every low-rank adapter."""

    @property
    def scale(self) -> float:
        """The factor of ``x A^T B^T``, of modules without a rank of their own."""
        return self.scale_at(self.rank)

    def scale_at(self, rank: int) -> float:
        """Returns the factor of ``x A^T B^T`` of a module with this rank."""
        alpha = self.alpha if self.alpha is not None else 2.0 * rank
        return alpha / rank**0.5 if self.rslora else alpha / rank

    @property
    def largest_rank(self) -> int:
        """The largest rank of any module."""
        return max(self.rank, *self.rank_pattern.values(), 0)

    @property
    def subtracts(self) -> bool:
        """Whether the change that A and B begin with is subtracted, so that training starts from the base."""
        return False

    @property
    def trains_a(self) -> bool:
        """Whether A is trained."""
        return True


class InitOptions(Section):
    """Options of the initial values that read training data.

    Attributes:
        num_steps: Steps of training data that ``eva`` and ``lora_ga`` read before the first step. Training begins with
            the same data.
        rho: Largest rank that ``eva`` gives to a layer, divided by its own; 1 keeps all ranks. The sum of the ranks
            stays.
        scale: ``stable`` multiplies the B of ``lora_ga`` by ``out_features ** 0.25 / sqrt(gamma)``, ``unit`` by 1.
        gamma: See ``scale``.
        iterations: Further subspace iterations that ``eva`` and ``lora_ga`` make, each over all of these data.
    """

    num_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    rho: Annotated[float, Field(ge=1, le=1_000)] = 2.0
    scale: Literal["stable", "unit"] = "stable"
    gamma: Annotated[float, Field(gt=0, le=1_000_000)] = 16.0
    iterations: Annotated[int, Field(ge=0, le=100)] = 1


class WeightAdapter(LowRankAdapter):
    """Options of low-rank adapters that change every weight of a layer by itself.

    The base keeps its bytes with every ``init``. Where B A is not zero, but with ``loftq``, the initial A0 and B0 are
    subtracted: the function is ``x W^T + scale * (x A^T B^T - x A0^T B0^T)``, so the model without its adapter is the
    one that training began with. It is saved as one adapter of twice the rank.

    Attributes:
        init: How A and B begin. ``kaiming``: A uniform, B zero. ``gaussian``: A normal with a deviation of 1 / rank, B
            zero. ``orthogonal``: random with B A = 0, for even ranks. ``pissa``: the principal directions of the base
            (Meng et al. 2024, arXiv 2404.02948). ``olora``: the first directions of its QR decomposition (Büyükakyüz
            2024, arXiv 2406.01775). ``loftq``: the principal directions of what quantization took from the base, which
            the adapter so begins to give back (Li et al. 2023, arXiv 2310.08659, with one iteration). ``eva``: A with
            the principal directions of the layer's inputs, B zero (Paischer et al. 2024, arXiv 2410.07170).
            ``lora_ga``: principal directions of the gradient of the base (Wang et al. 2024, arXiv 2407.05000).
        init_options: Options of ``eva`` and ``lora_ga``.
        freeze_a: Train B alone, so that the inputs of adapted layers need not be kept for the backward pass (Zhang et
            al. 2023, "LoRA-FA", arXiv 2308.03303).
        precondition: With ``freeze_a``: multiply the gradient of B with ``(A A^T)^-1 / scale^2`` before the update, so
            that the change of the weight follows the gradient of the weight as closely as A allows.
    """

    init: Init = "kaiming"
    init_options: InitOptions = InitOptions()
    freeze_a: bool = False
    precondition: bool = False

    @property
    def subtracts(self) -> bool:
        """Whether the change that A and B begin with is subtracted, so that training starts from the base."""
        return self.init in SUBTRACTING

    @property
    def trains_a(self) -> bool:
        """Whether A is trained."""
        return not self.freeze_a


class LoraAdapter(WeightAdapter):
    """Low-rank adaptation: ``y = x W^T + scale * dropout(x) A^T B^T``.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3.

    Attributes:
        merge_aware: Train the last part of the run through the rounding of the merge, so that the merge loses less.
            If null, train without rounding.
    """

    kind: Literal["lora"] = "lora"
    merge_aware: MergeAware | None = None


class DoraAdapter(WeightAdapter):
    """LoRA of the directions of a weight's rows, with their lengths trained apart.

    ``y = m / n * (x W^T + scale * dropout(x) A^T B^T)``, where m has one trained value for each row and n is the length
    of the row of ``W + scale * B A``, whose gradient is ignored.

    Source: Liu et al. 2024, "DoRA" (arXiv 2402.09353), equations 5 and 11.
    """

    kind: Literal["dora"]


class QaLoraAdapter(LowRankAdapter):
    """LoRA whose update is constant within each group of the base's format, so that it merges exactly.

    ``y = x W^T + scale * dropout(pool(x)) A^T B^T``, where ``pool`` sums the inputs of each group and A has one column
    per group. It needs a format with a free offset per group: q4_1, q5_1 or hqq.

    Source: Xu et al. 2023, "QA-LoRA" (arXiv 2309.14717), section 3.3.

    Attributes:
        train_rounding: Round the offsets in training as the merge does, which makes the merge lossless.
    """

    kind: Literal["qa_lora"]
    train_rounding: bool = False


_Adapter = Annotated[
    NoAdapter
    | LoraAdapter
    | DoraAdapter
    | QaLoraAdapter
    | BottleneckAdapter
    | PrefixAdapter
    | PromptAdapter
    | Ia3Adapter
    | BitfitAdapter
    | PeftAdapter,
    Field(discriminator="kind"),
]
#: Kinds without a required option, which may be written as ``adapter: KIND``.
_Kind = Literal["none", "lora", "dora", "qa_lora", "bottleneck", "prefix", "prompt", "ia3", "bitfit"]
AdapterConfig = Annotated[_Adapter, tagged("kind", default="lora", input_type=_Adapter | _Kind)]
