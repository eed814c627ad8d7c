"""``optim:`` optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.section import Positive, Section

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with a warmed-up schedule.

    Attributes:
        lr: Peak learning rate. 2e-4 suits LoRA; full fine-tuning wants about a tenth.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; never on biases, norms and embeddings.
        schedule: Shape after the warm-up.
        warmup_steps: Steps of linear warm-up; when null, ``warmup_ratio`` of the run.
        warmup_ratio: Share of the run spent warming up when ``warmup_steps`` is null.
        min_lr_ratio: Where linear and cosine end, as a share of ``lr``.
        max_grad_norm: Gradients longer than this are scaled down to it; null turns clipping off.
    """

    lr: Annotated[float, Field(gt=0, le=1_000)] = 2e-4
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    warmup_ratio: Fraction = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Positive | None = 1.0
