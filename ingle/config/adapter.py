"""``adapter:`` what is trained on top of the base."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.base import FormatName
from ingle.config.section import Section, Strings, Text, tagged

Patterns = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]


class NoAdapter(Section):
    """Full fine-tuning: every weight of the model is trained."""

    kind: Literal["none"]


class MergeAware(Section):
    """Trains the last part of a run through the rounding that merging will do.

    Each step then multiplies with ``decode(encode(W + scale * B A))``, packed once a step, and the gradient goes
    straight through the rounding; A and B learn to survive it. Dropout is off in that part.

    Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432),
    section 4, the straight-through estimator.

    Attributes:
        format: What the merged weights will be held in; the base's own format when null.
        fraction: Share of the run's steps, at its end.
    """

    format: FormatName | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.25

    def first_step(self, num_steps: int) -> int:
        """The first (1-based) step that trains through the rounding, in a run of ``num_steps``."""
        return num_steps - math.ceil(self.fraction * num_steps) + 1


class LowRankAdapter(Section):
    """What all low-rank adapters share.

    Attributes:
        rank: Rows of A, columns of B.
        alpha: ``scale = alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``). 2 * rank when null.
        dropout: Share of the adapter's inputs set to zero in training.
        rslora: Rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).
        lora_plus_ratio: Learning rate of B over that of A (Hayou et al. 2024, arXiv 2402.12354); 1 is plain LoRA.
        target_modules: ``all-linear``, or patterns matched against the end of a module's path
            (``q_proj``, ``layers.*.mlp.*``). ``all-linear`` leaves out the head, and what PEFT would take for fused
            experts.
        trainable_modules: Modules trained whole and saved with the adapter (``embed_tokens``, ``lm_head``).
        path: An adapter folder in PEFT's layout to start from; its rank and targets must agree.
        allow_mismatch: Start from ``path`` even if it was trained on another base than this run's.
    """

    kind: str
    rank: Annotated[int, Field(ge=1, le=65_536)] = 16
    alpha: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1_000_000)] = 1.0
    target_modules: Literal["all-linear"] | Patterns = "all-linear"
    trainable_modules: Strings = ()
    path: Text | None = None
    allow_mismatch: bool = False

    @property
    def scale(self) -> float:
        """The factor in front of ``x A^T B^T``."""
        alpha = self.alpha if self.alpha is not None else 2.0 * self.rank
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank


class LoraAdapter(LowRankAdapter):
    """Low-rank adaptation: ``y = x W^T + scale * dropout(x) A^T B^T``.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3.

    Attributes:
        merge_aware: Trains the last part of the run through the rounding of the merge, so that little is lost in it;
            null leaves it out.
    """

    kind: Literal["lora"] = "lora"
    merge_aware: MergeAware | None = None


class QaLoraAdapter(LowRankAdapter):
    """LoRA whose change is constant in each group of the base's format, so that it merges exactly.

    ``y = x W^T + scale * dropout(pool(x)) A^T B^T``, where ``pool`` sums the inputs of each group and A has a column
    for each group. It needs a format that holds a free offset for each group: q4_1, q5_1 or hqq.

    Source: Xu et al. 2023, "QA-LoRA" (arXiv 2309.14717), section 3.3.

    Attributes:
        train_rounding: Multiply in training with the offsets rounded as the merge rounds them, so that it loses
            nothing at all.
    """

    kind: Literal["qa_lora"]
    train_rounding: bool = False


_Adapter = Annotated[NoAdapter | LoraAdapter | QaLoraAdapter, Field(discriminator="kind")]
AdapterConfig = Annotated[
    _Adapter, tagged("kind", default="lora", input_type=_Adapter | Literal["none", "lora", "qa_lora"])
]
