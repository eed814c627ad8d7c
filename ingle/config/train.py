"""``train:`` how long, in what batches, and how often to save."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import BatchSize, Count, Section


class TrainConfig(Section):
    """How long to train and in what batches.

    A *sequence* is one packed row (``data.packing``) or one document.

    Attributes:
        num_epochs: Passes over the data; ignored when ``num_steps`` is set.
        num_steps: Optimizer steps.
        global_batch_size: Sequences per optimizer step, over all devices and accumulation steps.
        micro_batch_size: Sequences per forward pass on one device; must divide ``global_batch_size``.
            When null, as large as fits into 8 sequences and 4,096 tokens.
        recompute: Drop each layer's activations and compute them again in backward: less memory, a third more work.
        compile: torch.compile per decoder layer; ``auto`` only when it pays for itself within the run.
        save_every: Steps between checkpoints; about ten in a run when null, 0 for none but the last.
        keep_checkpoints: How many of the newest checkpoints stay on disk.
        imatrix: Gather an importance matrix of the run's own inputs on the way, in ``imatrix.gguf`` of the run folder;
            ``ingle quantize --imatrix`` and llama.cpp read it.
        log_every: Steps between lines on the terminal; ``metrics.jsonl`` has every step.
    """

    num_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    num_steps: Count | None = None
    global_batch_size: BatchSize = 16
    micro_batch_size: BatchSize | None = None
    recompute: bool = False
    compile: Literal["auto"] | bool = "auto"
    save_every: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    keep_checkpoints: Count = 2
    imatrix: bool = False
    log_every: Count = 1
