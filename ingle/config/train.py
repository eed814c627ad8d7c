"""``train:`` length of the run, batch sizes and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import BatchSize, Count, Section


class EarlyStopping(Section):
    """Ends a run whose validation loss no longer falls.

    Attributes:
        patience: End the run after this many validations in a row without a gain.
        min_delta: A validation is a gain if its loss is lower than that of the last gain by more than this, in nats. If
            null, the difference must exceed its standard error, which is paired by held-out groups of rows.
    """

    patience: Count = 3
    min_delta: Annotated[float, Field(ge=0, le=1e9)] | None = None


class TrainConfig(Section):
    """Length of the run, batch sizes and checkpoints.

    A *sequence* is one packed row (``data.packing``) or one document.

    Attributes:
        num_epochs: Passes over the data. Ignored if ``num_steps`` is set.
        num_steps: Number of optimizer steps. If null, ``num_epochs`` decides.
        global_batch_size: Sequences per optimizer step, over all devices and accumulation steps.
        micro_batch_size: Sequences per forward pass on one device. ``auto`` or null is the fastest that fits: on a GPU
            the smallest within 2 % of the best speed, on a CPU as many as fit into 8 sequences and 4,096 tokens.
        compile: Compile each decoder layer with torch.compile. ``auto`` compiles only if it saves time within the run.
        save_every: Steps between checkpoints. If null, about ten checkpoints per run; 0 saves only the last one.
        keep_checkpoints: Number of most recent checkpoints to keep on disk.
        keep_best: Save the weights of the step with the lowest validation loss, instead of those of the last step. Its
            checkpoint stays on disk in addition to the most recent ones. Needs ``data.validation``.
        early_stopping: End the run when the validation loss no longer falls. If null, the run makes all its steps.
            Needs ``data.validation``.
        imatrix: Collect an importance matrix of the training inputs in ``imatrix.gguf`` in the run folder, for
            ``ingle quantize --imatrix`` and llama.cpp.
        router_loss: Weight of the load-balancing loss of a mixture of experts. ``auto`` is the architecture's own
            weight in full fine-tuning, and 0 with an adapter. ``loss`` includes it; ``router_loss`` is not weighted.
        log_every: Steps between lines on the terminal. ``metrics.jsonl`` always has every step.
        lessons: Say at the start where the config acts against what experiments of others have shown.
    """

    num_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    num_steps: Count | None = None
    global_batch_size: BatchSize = 16
    micro_batch_size: BatchSize | Literal["auto"] | None = "auto"
    compile: Literal["auto"] | bool = "auto"
    save_every: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    keep_checkpoints: Count = 2
    keep_best: bool = False
    early_stopping: EarlyStopping | None = None
    imatrix: bool = False
    router_loss: Literal["auto", "off"] | Annotated[float, Field(ge=0, le=1000)] = "auto"
    log_every: Count = 1
    lessons: bool = True
