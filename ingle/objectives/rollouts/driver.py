"""The objective that samples its own data: rollout, scores, evaluation, weights, then minibatches of the answers.

An iteration makes a buffer of answers with the current weights; the steps that follow learn from it. Nothing in the
buffer depends on the number of ranks, and every answer follows from weights and counters, so a run that was killed
anywhere ends with the same bytes.

Legend: R answers, N tokens of all answers end to end, F rewards, G answers to a prompt.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ingle import stopping
from ingle.adapters import BaseIdentity
from ingle.data import HeldOut, PromptSet
from ingle.data.batch import Batch, collate, round_up
from ingle.data.counters import Counters, Place, Purpose
from ingle.data.packing import Indices
from ingle.data.shared_prompts import share
from ingle.data.types import Sample
from ingle.events import Sink, Warned
from ingle.kernels.allocator import return_freed_memory
from ingle.objectives.answers import AnswerTokens, answer_logps, with_reference
from ingle.objectives.dealing import deal, start_without_labels
from ingle.objectives.interface import Check, Objective, OpenModel, Relief, StepModule
from ingle.objectives.pairs import PairLoss
from ingle.objectives.policy import PolicyLoss
from ingle.objectives.preferences import Initial
from ingle.objectives.rollouts.alarms import Alarms
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.objectives.rollouts.collecting import HELD_OUT, Collector, Iteration
from ingle.objectives.rollouts.journal import delete_journals
from ingle.objectives.rollouts.recipes import Recipe
from ingle.parallel import Mesh, call_outside_step

_BUFFER = "buffer."
#: Largest mean of |ratio - 1| between sampler and update that rounding in float32 explains.
_ROUNDING = 1e-3


class RolloutObjective(Objective):
    """Learns from answers that the model samples.

    Args:
        module: Computes the loss.
        recipe: What the objective makes of answers.
        collector: Samples and scores answers.
        initial: Makes the model compute its initial function, which is the reference; None without a reference.
        num_prompts: Prompts of an iteration.
        num_passes: Passes over the answers of an iteration.
        num_steps: Steps of the run.
        global_batch_size: Answers, or pairs, of a step.
        micro_batch_size: Documents of a forward pass.
        shares: Whether the prompt of a group is computed once.
        seed: Seed of the run.
        mesh: The ranks.
        held_out: Prompts for validation.
        is_precise: Whether the model computes in float32, in which the sampler differs by rounding at most.
        alarms: Watches the figures of iterations; None without rewards.
    """

    def __init__(
        self,
        module: StepModule,
        recipe: Recipe,
        collector: Collector,
        *,
        initial: Initial | None,
        num_prompts: int,
        num_passes: int,
        num_steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        shares: bool,
        seed: int,
        mesh: Mesh,
        held_out: HeldOut | None = None,
        is_precise: bool = False,
        alarms: Alarms | None = None,
    ) -> None:
        self.module, self._recipe, self._collector, self._initial = module, recipe, collector, initial
        self._num_prompts, self._num_passes = num_prompts, num_passes
        self._is_pair = isinstance(module, PairLoss)
        self._batch_rows = global_batch_size * (2 if self._is_pair else 1)
        self._steps = num_passes * num_prompts * recipe.rows // self._batch_rows
        self._num_iterations = -(-num_steps // self._steps)
        self._micro_batch_size = micro_batch_size
        self._shares, self._seed, self._mesh = shares, seed, mesh
        self.prepares = self._is_pair or hasattr(module, "prepare")
        self._held_out = held_out
        self._trusts_sampler = is_precise and self._steps == 1 and not recipe.reads_values
        self._iteration, self._draw, self._cursor = -1, 0, self._steps
        self._has_sampled = False
        self._buffer: SampleBuffer | None = None
        self._plan: list[Indices] = []
        self._figures: dict[str, float] = {}
        self._trail = hashlib.blake2b(digest_size=16).hexdigest()
        self._saved_iteration = 0
        self._alarms, self.pins_one = alarms, alarms is not None
        self._saved_step: int | None = None
        self._good_step: int | None = None

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return self._draw / self._collector.num_prompts

    def load_parts(self, identity: BaseIdentity | None, open_model: OpenModel) -> None:
        """Loads what the loss reads besides the model, and the trained reward models."""
        super().load_parts(identity, open_model)
        for each in self._collector.models.values():
            each.load(identity, open_model)

    def collect(self, step: int, relief: Relief, sink: Sink) -> bool:
        """Samples and scores answers if the next step needs new ones, and computes what they weigh."""
        if self._cursor < self._steps:
            return True
        if self._mesh.is_main:
            delete_journals(self._collector.folder, self._saved_iteration)
        number = self._iteration + 1
        iteration = Iteration(number, self._draw, self._num_prompts, step, self._trail)
        self._buffer = None  # its memory is free while new answers grow
        if not self._has_sampled:
            return_freed_memory()  # of tensors as they were read
        found = call_outside_step(self.module, self._collector.collect, iteration, self._recipe, sink)
        if found is None:
            return False
        if not self._has_sampled:  # later, the gaps are those of steps, which have room for the blocks of sampling
            return_freed_memory()
            self._has_sampled = True
        buffer, next_draw, figures = found
        if number == 0 and isinstance(self.module, PolicyLoss) and self.module.values is not None:
            self.module.values.begin_at(float(np.nan_to_num(buffer["rewards"]).mean()))
        began = time.monotonic()
        evaluated = self._evaluate(self._recipe.select(buffer), relief)
        if evaluated is None:
            return False
        figures["evaluate_s"] = time.monotonic() - began
        progress = min(1.0, (number + 1) / self._num_iterations)
        buffer, more = self._recipe.weigh(evaluated, progress)
        self._trusts_sampler &= more.get("sampler_deviation", 0.0) <= _ROUNDING
        self._iteration, self._draw, self._cursor = number, next_draw, 0
        self._buffer, self._figures = buffer, {"iteration": float(number), **figures, **more}
        self._plan = self._minibatches(buffer, number)
        if isinstance(self.module, PolicyLoss) and "kl_coef" in more:
            self.module.kl_coef = more["kl_coef"]
        self._watch(number, sink)
        return True

    def _watch(self, iteration: int, sink: Sink) -> None:
        """Reports alarms, and ends the run if one is to."""
        if self._alarms is None:
            return
        for alarm in self._alarms.update(iteration, self._figures):
            kept = (
                "the last step, as no checkpoint is from before that"
                if self._good_step is None
                else f"step {self._good_step:,}"
            )
            ends = f" The run ends with the weights of {kept}." if alarm.stops else ""
            sink(Warned(f"{alarm.message}{ends} To go on: {alarm.fix}.", where=f"objective.alarms.{alarm.name}"))
            self.is_over |= alarm.stops
        if self._alarms.is_quiet:  # the answers of this iteration speak for the weights that were saved before it
            self._good_step = self._saved_step

    def kept_step(self, step: int) -> int | None:
        """Returns the last saved step whose answers showed no sign of an alarm that ends the run."""
        self._saved_step = step
        return self._good_step

    def _minibatches(self, buffer: SampleBuffer, iteration: int) -> list[Indices]:
        """Returns the answers of each step of an iteration; the first pass has the order of the buffer."""
        plan = buffer.minibatches(self._batch_rows)
        for number in range(1, self._num_passes):
            counters = Counters(self._seed, Place(iteration, number))
            permute = partial(counters.permutation, Purpose.MINIBATCH)
            plan += buffer.minibatches(self._batch_rows, permute, by_group=self._shares or self._is_pair)
        return plan

    def next_batches(self) -> Sequence[Batch]:
        """Returns this rank's micro-batches of the next step."""
        assert self._buffer is not None, "no answers were collected"
        rows = self._plan[self._cursor]
        self._cursor += 1
        self.idle_steps += not _teaches(self._buffer.select(rows))
        return self._batches(self._buffer, rows)

    def _batches(self, buffer: SampleBuffer, rows: Indices) -> list[Batch]:
        samples = buffer.samples(rows, masked=self._recipe.masks_labels)
        units = list(zip(samples[::2], samples[1::2], strict=True)) if self._is_pair else [(each,) for each in samples]
        dealt = deal(units, self._micro_batch_size, self._mesh)
        return [self._collate([each for unit in part for each in unit], samples[0]) for part in dealt]

    def _collate(self, samples: Sequence[Sample], other: Sample) -> Batch:
        if not samples:
            return start_without_labels(other).to(self._mesh.device)
        trees = share(samples) if self._shares else samples
        return round_up(collate(trees)).to(self._mesh.device)

    def _evaluate(self, buffer: SampleBuffer, relief: Relief) -> SampleBuffer | None:
        """Adds what the policy and the reference say about the answers before the update.

        In the micro-batches of the first pass, so that the importance ratios of its first step are exactly 1. Returns
        None if a rank was asked to stop; the journal then has the answers.
        """
        recipe, module = self._recipe, self.module
        if not isinstance(module, PolicyLoss):
            return buffer
        # Where the sampler computes what the update does, and the answers are learned from once, it has the last word
        # on its own probabilities; the first iteration proves that it may.
        trusts_sampler = self._trusts_sampler and self._iteration >= 0
        if trusts_sampler and not recipe.reads_reference:
            return buffer
        found: dict[str, list[Any]] = {}
        was_training = module.training
        for rows in buffer.minibatches(self._batch_rows):
            batches = self._batches(buffer, rows)
            own = relief.attempt(lambda parts: self._ask(parts, asks_policy=not trusts_sampler), batches)
            if own is None:
                return None
            everywhere = self._mesh.gather([{name: each.numpy(force=True) for name, each in c.items()} for c in own])
            # Micro-batches are dealt like cards, and each rank splits its own ones into equally many parts.
            pieces = len(own) // len(batches) if self._mesh.world_size > 1 else len(own)
            for first in range(0, len(own), pieces):
                for columns in (part for parts in everywhere for part in parts[first : first + pieces]):
                    for name, values in columns.items():
                        found.setdefault(name, []).append(values)
        module.train(was_training)
        names = {"logps": "old_logps", "entropies": "entropies"}
        return buffer.adding(**{names.get(name, name): np.concatenate(parts) for name, parts in found.items()})

    def _ask(self, parts: Sequence[Batch], *, asks_policy: bool) -> list[dict[str, Tensor]] | None:
        """Returns what the policy and the reference say about the tokens of the answers of each micro-batch.

        None if a rank was asked to stop.
        """
        module = self.module
        assert isinstance(module, PolicyLoss)
        own: list[dict[str, Tensor]] = [{} for _ in parts]
        module.eval()
        with torch.no_grad():
            for columns, part in zip(own, parts, strict=True) if asks_policy else ():
                if self._must_stop():
                    return None
                columns |= call_outside_step(module, module.evaluate, part)
            if self._recipe.reads_reference:
                assert self._initial is not None, "there is no reference"
                with self._initial():
                    for columns, part in zip(own, parts, strict=True):
                        if self._must_stop():
                            return None
                        columns["reference_logps"] = call_outside_step(module, module.reference_logps, part)
        return own

    def _must_stop(self) -> bool:
        return self._mesh.agree(stopping.requested() is not None)

    def prepare(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        """Adds the log-probabilities of the reference to pairs; other modules may add columns of their own."""
        if not self._is_pair:
            prepared: Sequence[Batch] = self.module.prepare(parts)  # type: ignore[operator] # see prepares
            return prepared
        assert self._initial is not None, "there is no reference"
        was_training = self.module.training
        self.module.eval()
        with self._initial():
            logps = [call_outside_step(self.module, self._logps, part) for part in parts]
        self.module.train(was_training)
        found = zip(parts, logps, strict=True)
        return [replace(part, columns={**part.columns, **with_reference(each, part)}) for part, each in found]

    def _logps(self, part: Batch) -> Tensor:
        return answer_logps(self.module.model, part, AnswerTokens.of(part).targets)

    def held_out_batches(self) -> Iterator[tuple[Indices, Batch]]:
        """Yields nothing: answers to held-out prompts are sampled."""
        return iter(())

    @property
    def row_measures(self) -> Sequence[str]:
        """Names of the figures of a validation."""
        return (*HELD_OUT, *(f"rewards/{name}" for name in self._collector.names))

    def measure_held_out(self, must_stop: Callable[[], bool]) -> Iterator[tuple[Indices, Tensor] | None]:
        """Yields minus the reward of an answer to each held-out prompt, and its figures."""
        assert self._held_out is not None, "nothing is held out"
        documents, prompts = self._held_out.documents, self._held_out.dataset
        assert isinstance(prompts, PromptSet)
        found_DC = self._collector.measure(prompts, documents.tolist(), self._recipe, lambda event: None)
        if found_DC is None:
            yield None
            return
        own = slice(self._mesh.dist_rank, None, self._mesh.world_size)
        figures_DC = np.column_stack([-found_DC[:, 0], found_DC])[own]
        known_DC = ~np.isnan(figures_DC)
        pairs_DC2 = np.stack([np.where(known_DC, figures_DC, 0.0), known_DC], 2)
        yield documents[own], torch.from_numpy(pairs_DC2.reshape(len(pairs_DC2), -1))

    def start_checks(self, parts: Sequence[Batch]) -> Sequence[Check]:
        """Returns the check that the policy of the update is the one that sampled, to the bit."""
        module = self.module
        if not isinstance(module, PolicyLoss):
            return ()
        module.eval()
        deviation = max(call_outside_step(module, module.largest_deviation, part) for part in parts)
        return (
            Check(
                "importance ratios",
                1.0 + deviation,
                1.0,
                0.0 if self._mesh.device.type == "cpu" else 1e-2,
                "The policy of the update differs from the one whose probabilities were recorded.",
                "set --adapter.dropout=0, and leave out adapter.merge_aware",
            ),
        )

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Returns the figures of the iteration and of the step."""
        return {**self._figures, **super().metrics(sums, counts)}

    def after_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Extends the trail, which names the weights by all that led to them."""
        step = repr((self._trail, self._iteration, self._cursor, sorted((name, sums[name].hex()) for name in sums)))
        self._trail = hashlib.blake2b(step.encode(), digest_size=16).hexdigest()

    def close(self) -> None:
        """Ends the processes that score answers."""
        self._collector.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns counters, figures and the state of the recipe; in the middle of an iteration, its answers, too."""
        self._saved_iteration = self._iteration + (self._cursor >= self._steps)
        plain = {
            "iteration": self._iteration,
            "draw": self._draw,
            "cursor": self._cursor,
            "trail": self._trail,
            "trusts_sampler": self._trusts_sampler,
            "idle_steps": self.idle_steps,
            "figures": self._figures,
            "recipe": self._recipe.state_dict(),
            "alarms": None if self._alarms is None else self._alarms.state_dict(),
            "good_step": self._good_step,
            "is_over": self.is_over,
        }
        if self._buffer is None or self._cursor >= self._steps:
            return plain
        return plain | {_BUFFER + name: column for name, column in self._buffer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._iteration, self._draw, self._cursor = (int(state[name]) for name in ("iteration", "draw", "cursor"))
        self._trail, self._figures = str(state["trail"]), dict(state["figures"])
        self.idle_steps, self._trusts_sampler = int(state["idle_steps"]), bool(state["trusts_sampler"])
        self._recipe.load_state_dict(state["recipe"])
        self._saved_iteration = self._iteration + (self._cursor >= self._steps)
        if self._alarms is not None:
            self._alarms.load_state_dict(state["alarms"])
        self._good_step, self.is_over = state["good_step"], bool(state["is_over"])
        columns = {name.removeprefix(_BUFFER): each for name, each in state.items() if name.startswith(_BUFFER)}
        self._buffer = SampleBuffer.from_state(columns) if columns else None
        self._plan = [] if self._buffer is None else self._minibatches(self._buffer, self._iteration)
        if isinstance(self.module, PolicyLoss) and "kl_coef" in self._figures:
            self.module.kl_coef = self._figures["kl_coef"]


def _teaches(part: SampleBuffer) -> bool:
    """Returns whether the answers of a step have anything to learn from."""
    if "advantages" in part.columns:
        return bool(part["advantages"][part["weights"] > 0].any())
    if "scores" in part.columns:
        return bool(np.diff(part["scores"].reshape(-1, 2)).any())
    return "counted" not in part.columns or bool(part["counted"].any())
