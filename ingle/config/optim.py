"""``optim:`` the optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.section import Positive, Section

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with warm-up and a learning-rate schedule.

    Attributes:
        lr: Peak learning rate. 2e-4 suits LoRA; use about a tenth of it for full fine-tuning.
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay; not applied to biases, norms and embeddings.
        schedule: Shape of the learning rate after the warm-up.
        warmup_steps: Steps of linear warm-up. If null, ``warmup_ratio`` decides.
        warmup_ratio: Fraction of the run's steps used for warm-up. Ignored if ``warmup_steps`` is set.
        min_lr_ratio: Final learning rate of ``linear`` and ``cosine``, as a fraction of ``lr``.
        max_grad_norm: Scale down gradients whose norm is larger than this. If null, do not clip.
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
