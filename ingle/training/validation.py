"""Validation during training: the loss on held-out documents, at fixed steps.

The forward passes of a validation change nothing that training depends on: every micro-batch of training seeds its own
random numbers, the order of the data is a counter, and the importance matrix does not observe held-out text.

Legend: D held-out documents, G groups of them, C figures: the loss and its denominator, then each further measure and
its denominator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ingle import stopping
from ingle.config.run import Run
from ingle.data import HeldOut
from ingle.data.batch import Batch
from ingle.errors import NonFiniteError
from ingle.events import Validated
from ingle.objectives import Objective
from ingle.parallel import Mesh, call_outside_step
from ingle.report.results import ValidationReport
from ingle.training.out_of_memory import MemoryRelief
from ingle.training.selection import Selection, mean_loss
from ingle.training.steps import prepare


class Validation:
    """Measures the loss on held-out documents at some steps of a run, and keeps what was found.

    Args:
        run: The run.
        every: Steps between validations; 0 for none.
        objective: Computes the loss.
        held_out: The documents; None without validation.
        mesh: The ranks.
        relief: Splits micro-batches on a device that ran out of memory.
        score: Returns further figures of the model; the ranks call it together.

    Attributes:
        selection: The validations so far; a part of every checkpoint.
    """

    def __init__(
        self,
        run: Run,
        every: int,
        objective: Objective,
        held_out: HeldOut | None,
        mesh: Mesh,
        relief: MemoryRelief,
        score: Callable[[], dict[str, float]],
    ) -> None:
        self.selection = Selection(run.train.early_stopping)
        self._every = every if held_out is not None else 0
        self._keeps_best = run.train.keep_best
        self._objective, self._held_out, self._mesh, self._relief = objective, held_out, mesh, relief
        self._score = score

    def is_due(self, step: int) -> bool:
        """Returns whether the weights after ``step`` steps are to be validated, and have not been yet."""
        return self._every > 0 and step % self._every == 0 and self.selection.step != step

    @property
    def kept_step(self) -> int | None:
        """The step whose weights are the result, if it is not the last one."""
        return self.selection.best_step if self._keeps_best and self.selection.history else None

    def take(self, step: int) -> Validated | None:
        """Measures the loss after a step; returns None if a rank was asked to stop in the meantime.

        Raises:
            NonFiniteError: The loss is NaN or infinite.
        """
        began = time.monotonic()
        module, is_alone = self._objective.module, self._mesh.world_size == 1
        module.eval()
        try:
            # Ranks agree on a stop between micro-batches; one process may stop anywhere, because weights do not change.
            with stopping.at_once() if is_alone else nullcontext():
                table_GC = self._measure()
                if table_GC is None:
                    return None
                table_G2 = table_GC[:, :2]
                loss = mean_loss(table_G2)
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"The validation loss became {loss} after step {step}.",
                        where="data.validation",
                        fix="use a smaller --optim.lr or --model.dtype=float32; the last checkpoint is intact",
                    )
                further = self._row_means(table_GC[:, 2:]) | self._score()
        except KeyboardInterrupt:
            if is_alone:
                return None
            raise
        finally:
            module.train()
        point = self.selection.add(step, table_G2, further)
        return Validated(
            **{name: getattr(point, name) for name in ("step", "loss", "gain", "gain_stderr", "metrics")},
            best_step=self.selection.best_step,
            best_loss=self.selection.best_loss,
            seconds=time.monotonic() - began,
        )

    @torch.no_grad()
    def _measure(self) -> Tensor | None:
        """Returns the figures of each group over all ranks, [G, C]; None if a rank was asked to stop."""
        measured = self._objective.measure_held_out(lambda: stopping.requested() is not None)
        if measured is None:
            measured = self._measure_own(self._batches())
        return self._collect(call_outside_step(self._objective.module, lambda: list(measured)))

    def _batches(self) -> Iterable[tuple[np.ndarray, list[Batch]]]:
        """Returns documents and their batches in parts, which are made when they are needed or prepared together."""
        found = ((documents, self._relief.split([batch])) for documents, batch in self._objective.held_out_batches())
        if not self._objective.prepares:
            return found
        held_out = list(found)
        prepared = iter(prepare(self._objective, [part for _, parts in held_out for part in parts]))
        return [(documents, list(islice(prepared, len(parts)))) for documents, parts in held_out]

    def _measure_own(
        self, batches: Iterable[tuple[np.ndarray, list[Batch]]]
    ) -> Iterator[tuple[np.ndarray, Tensor] | None]:
        """Yields documents and their losses for each micro-batch of this rank; None if a rank was asked to stop."""
        module = self._objective.module
        for documents, parts in batches:
            if self._mesh.agree(stopping.requested() is not None):
                yield None
                return
            yield documents, torch.cat([module.per_document(part) for part in parts]).cpu()

    def _row_means(self, table_GC: Tensor) -> dict[str, float]:
        """Returns the mean of each further figure from its sums and counts by group; without means over nothing."""
        names, totals = self._objective.row_measures, table_GC.sum(0).view(-1, 2).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def _collect(self, own: list[tuple[np.ndarray, Tensor] | None]) -> Tensor | None:
        """Returns the figures of each group over all ranks, [G, C]; None if the validation was interrupted."""
        assert self._held_out is not None
        everywhere = [part for parts in self._mesh.gather(own) for part in parts]
        if None in everywhere:
            return None
        complete = [part for part in everywhere if part is not None]
        documents = np.concatenate([documents for documents, _ in complete])
        order = np.argsort(documents)  # sums do not depend on the number of ranks
        places = np.searchsorted(self._held_out.documents, documents[order])
        groups, count = self._held_out.groups[places], self._held_out.num_groups
        # Of documents that are joined into one, only the first is among them.
        assert len(np.unique(documents)) == len(documents) and len(np.unique(groups)) == count, "a document is missing"
        table_DC = torch.cat([figures for _, figures in complete]).numpy()[order]
        columns = [np.bincount(groups, column, count) for column in table_DC.T]
        return torch.from_numpy(np.stack(columns, 1))

    def report(self, last_step: int) -> ValidationReport | None:
        """Returns the validations of a run that made ``last_step`` steps; None without any."""
        if self._held_out is None or not self.selection.history:
            return None
        return ValidationReport(
            every=self._every,
            documents=len(self._held_out.documents),
            groups=self._held_out.num_groups,
            tokens=self._held_out.num_tokens,
            best_step=self.selection.best_step,
            kept_step=self.kept_step if self.kept_step is not None else last_step,
            stopped_early=self.selection.should_stop,
            history=tuple(self.selection.history),
        )
