"""What a run does when its device runs out of memory: it computes the step again in smaller parts, and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ingle.atomic import write_atomically
from ingle.data.batch import Batch, round_up
from ingle.errors import DoesNotFit, OutOfMemory
from ingle.events import Sink, Warned
from ingle.parallel import Mesh
from ingle.wording import plural

T = TypeVar("T")


@dataclass
class MemoryRelief:
    """How the micro-batches of a run are split, and whether its layers are recomputed.

    The steps stay the same: the same sequences in the same order, and the same gradient up to the order of sums. A file
    keeps the settings, so that a resumed run does not run out of memory again.

    One process computes the step again at once. A rank cannot: the others wait for it to gather the weights of the next
    layer. It keeps the new settings and ends, and the launcher starts all ranks from the last checkpoint.

    Attributes:
        file: Where the settings are kept.
        mesh: The ranks.
        sink: Receives a warning about each change.
        turn_on_recompute: Makes the layers recompute their activations; None if they do so already.
        num_parts: Parts into which each micro-batch is split.
    """

    file: Path
    mesh: Mesh
    sink: Sink
    turn_on_recompute: Callable[[], None] | None
    num_parts: int = 1

    def restore(self) -> None:
        """Applies the settings of an earlier start of the run."""
        kept = json.loads(self.file.read_bytes()) if self.mesh.is_main and self.file.is_file() else {}
        kept = self.mesh.broadcast(kept)
        self.num_parts = kept.get("num_parts", 1)
        if kept.get("recompute") and self.turn_on_recompute is not None:
            self._recompute(self.turn_on_recompute)

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        """Splits micro-batches into parts; on several ranks, all into equally many."""
        if self.num_parts == 1:
            return list(batches)
        parts: list[Batch] = []
        for batch in batches:
            found = [round_up(part) for part in batch.split(self.num_parts)]
            missing = self.num_parts - len(found) if self.mesh.world_size > 1 else 0
            parts += found + [min(found, key=lambda part: part.num_tokens).without_labels()] * missing
        return parts

    def relieve(self, reason: str, batches: Sequence[Batch]) -> None:
        """Changes the settings so that the next attempt needs less memory, and keeps them.

        Args:
            reason: The message about the lack of memory.
            batches: The micro-batches of the step, not split.

        Raises:
            DoesNotFit: No micro-batch can be split further, and the layers are recomputed already.
            OutOfMemory: This is one of several ranks.
        """
        before, after = (
            sum(len(batch.split(parts)) for batch in batches) for parts in (self.num_parts, self.num_parts * 2)
        )
        if after > before:
            self.num_parts *= 2
            change = f"each micro-batch is computed in {plural(self.num_parts, 'part')}"
        elif self.turn_on_recompute is not None:
            self._recompute(self.turn_on_recompute)
            change = "activations are recomputed in the backward pass"
        else:
            longest = max(int(batch.cu_seqlens.diff()[: max(1, batch.num_documents)].max()) for batch in batches)
            raise DoesNotFit(
                "The device ran out of memory with one document at a time and recomputed activations.",
                where=f"a document of {longest:,} tokens",
                why=reason,
                fix="--parallel.offload=true, --base.format=nf4 or a smaller --data.max_seq_len",
            )
        settings = {"num_parts": self.num_parts, "recompute": self.turn_on_recompute is None}
        write_atomically(self.file, json.dumps(settings).encode())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.mesh.world_size > 1:
            raise OutOfMemory(
                f"Rank {self.mesh.dist_rank} ran out of memory; after a restart, {change}.",
                where=f"rank {self.mesh.dist_rank} of {self.mesh.world_size}",
                why=reason,
                fix="repeat the command: the run goes on from its last checkpoint, with the same batches",
            )
        message = f"The device ran out of memory; from now on {change}. Batches and their order stay the same."
        self.sink(Warned(message, where=reason))

    def attempt(self, compute: Callable[[list[Batch]], T], batches: Sequence[Batch]) -> T:
        """Returns what a function computes from micro-batches, split as often as memory demands.

        Raises:
            DoesNotFit: No micro-batch can be split further.
            OutOfMemory: This is one of several ranks.
        """
        while True:
            try:
                return compute(self.split(batches))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            self.relieve(reason, batches)

    def _recompute(self, turn_on: Callable[[], None]) -> None:
        turn_on()
        self.turn_on_recompute = None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text."""
    return str(error).strip().split("\n")[0] or type(error).__name__
