"""Learning rate as a pure function of the step: resuming needs no state."""

from __future__ import annotations

import math

from ingle.config.optim import OptimConfig


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Returns the steps of linear warm-up in a run of ``num_steps``."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * num_steps)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of a step.

    The warm-up rises linearly and reaches ``lr`` at its last step; linear and cosine then fall to
    ``lr * min_lr_ratio`` at the last step of the run.

    Args:
        config: The ``optim`` section, with a learning rate.
        step: 1-based step.
        num_steps: Steps in the run.

    Source:
        Loshchilov and Hutter 2017, "SGDR" (arXiv 1608.03983), equation 5, without restarts.
    """
    assert config.lr is not None, "Run.optimizer has one"
    warmup = warmup_steps(config, num_steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor)
