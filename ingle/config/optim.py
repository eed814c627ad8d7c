"""``optim:`` the optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.section import Positive, Section

#: Peak learning rates by the family of the objective: with an adapter, and of all weights.
DEFAULT_LR: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("text", "corruption", "labels"), (2e-4, 2e-4)),
    **dict.fromkeys(("pairs", "judged"), (2e-5, 1e-6)),
    "reward": (1e-4, 1e-5),
    "prompts": (1e-5, 1e-6),
}

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with warm-up and a learning-rate schedule.

    Attributes:
        lr: Peak learning rate. If null, it depends on the objective and on whether an adapter is trained: 2e-4 for
            supervised training (full fine-tuning needs about a tenth of it); with an adapter, 2e-5 for preferences,
            1e-4 for reward models and 1e-5 for sampled answers; without one, 1e-6, 1e-5 and 1e-6.
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay; not applied to biases, norms and embeddings.
        schedule: Shape of the learning rate after the warm-up.
        warmup_steps: Steps of linear warm-up. If null, ``warmup_ratio`` decides.
        warmup_ratio: Fraction of the run's steps used for warm-up. Ignored if ``warmup_steps`` is set.
        min_lr_ratio: Final learning rate of ``linear`` and ``cosine``, as a fraction of ``lr``.
        max_grad_norm: Scale down gradients whose norm is larger than this. If null, do not clip.
    """

    lr: Annotated[float, Field(gt=0, le=1_000)] | None = None
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    warmup_ratio: Fraction = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Positive | None = 1.0
