"""The objectives of everything that reads answers: prompts are shared, and a reference is computed before each step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ingle.data.batch import Batch, collate, round_up
from ingle.data.corruption import Corruption
from ingle.data.counters import Place
from ingle.data.dataset import TokenDataset
from ingle.data.packing import Indices, Sequences
from ingle.data.shared_prompts import share
from ingle.data.types import Sample
from ingle.events import Sink, Warned
from ingle.models import forward_hidden, through_head
from ingle.objectives.answers import AnswerTokens, answer_logps, log_ratios, reverse_divergences, with_reference
from ingle.objectives.driver import PackedObjective
from ingle.objectives.falling import Falling
from ingle.objectives.interface import Relief, StepModule
from ingle.objectives.mismatches import Mismatches
from ingle.objectives.reference_cache import ReferenceCache, answer_keys
from ingle.objectives.token_loss import head_logps
from ingle.parallel import call_outside_step

_Result = TypeVar("_Result")

#: Makes a model compute its initial function inside a block.
Initial = Callable[[], AbstractContextManager[None]]


class Sharing:
    """Shares the prompts of rows, after another corruption.

    Args:
        before: What turns documents into samples; None leaves them as they are.

    Attributes:
        is_on: Whether prompts are shared; otherwise they are repeated.
    """

    def __init__(self, before: Corruption | None = None) -> None:
        self._before = before
        self.is_on = True

    def __call__(self, samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
        """Returns the samples, as trees where the answers of a row have a prompt in common."""
        joined = samples if self._before is None else self._before(samples, places)
        return share(joined) if self.is_on and joined and "group_ids" in joined[0].columns else joined


class PreferenceObjective(PackedObjective):
    """Preferences, with the log-probabilities of the reference as a column of each micro-batch.

    Args:
        module: Computes the loss.
        arguments: As for :class:`PackedObjective`.
        initial: Makes the model compute its initial function, which is the reference; None without a reference.
        beta: Factor on log-ratios in the rewards of chosen answers, if there are such rewards.
        kl_steps: The steps at which the divergence from the reference is measured (``kl``).
        options: As for :class:`PackedObjective`.

    Attributes:
        cache: Values of the reference that are known; None without one.
    """

    def __init__(
        self,
        module: StepModule,
        *arguments: Any,
        initial: Initial | None,
        beta: float | None = None,
        kl_steps: Container[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(module, *arguments, **options)
        self._initial = initial
        self._beta = beta
        self._kl_steps, self._is_kl_due = kl_steps, False
        self._measured: dict[str, float] = {}
        self._falling = Falling()
        self.prepares = initial is not None
        self.cache: ReferenceCache | None = None
        self._is_complete = False

    def collect(self, step: int, relief: Relief, sink: Sink) -> bool:
        """Says once if the chosen answers become less likely."""
        self._measured, self._is_kl_due = {}, step in self._kl_steps
        if (hint := self._falling.hint()) is not None:
            sink(Warned(hint, where="objective"))
        return True

    def after_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Watches the chosen answers."""
        if self._beta is not None and counts.get("pairs"):
            self._falling.update(sums["rewards/chosen"] / counts["pairs"] / self._beta)

    def prepare(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        """Adds the log-probabilities of the reference."""
        assert self._initial is not None, "there is no reference"
        if self._is_kl_due:
            self._measured |= self._measure_kl(parts, self._initial)
            self._is_kl_due = False
        if self.module.reads_states:
            with self._initial():
                states = self._evaluate(parts, self._read_states)
            return [_with(part, own) for part, own in zip(parts, states, strict=True)]
        found = zip(parts, self._references(parts, self._initial), strict=True)
        return [_with(part, with_reference(logps_N, part)) for part, logps_N in found]

    def _measure_kl(self, parts: Sequence[Batch], initial: Initial) -> dict[str, float]:
        """Returns the divergence from the reference along the answers of a step, over all ranks, in nats per answer."""
        model, own = self.module.model, {"sum": 0.0, "answers": 0.0}
        for part in parts:  # one after the other, since hidden states are large
            with initial():
                (states_NH,) = self._evaluate([part], lambda part: forward_hidden(model, part)[0])
            tokens = AnswerTokens.of(part)
            compare = partial(reverse_divergences, model, targets_N=tokens.targets, states_NH=states_NH)
            (found_N,) = self._evaluate([part], compare)
            own["sum"] += float(found_N.double().sum())
            own["answers"] += float((tokens.lengths > 0).sum())
        total = self._mesh.reduce(own)
        return {"kl": total["sum"] / total["answers"]} if total["answers"] else {}

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Returns the means of the step, and what was measured before it."""
        return super().metrics(sums, counts) | self._measured

    @torch.no_grad()
    def prepare_all(self, num_steps: int, on_progress: Callable[[int, int], None]) -> None:
        """Computes the values of all answers of a run while the model still is its own reference.

        All ranks call it together, before a checkpoint is restored. What the cache has is not computed again.

        Args:
            num_steps: Steps of the run.
            on_progress: Called with the number of steps whose answers are done, and their total.
        """
        if self.cache is None:
            return
        counter = self._counter
        total = min(num_steps, -(-len(self._sampler) // self._global_batch_size))
        try:
            for done in range(total):
                on_progress(done, total)
                self._references([*self.next_batches(), *self._further_parts()], nullcontext)
            held_out = [batch for _, batch in self.held_out_batches()]
            self._references([*held_out, *self._further_parts()], nullcontext)
        finally:
            self.cache.flush()
        on_progress(total, total)
        self._counter = counter
        self._is_complete = True

    def _further_parts(self) -> Sequence[Batch]:
        """Returns further answers of the latest batches that the reference must score."""
        return ()

    def _references(self, parts: Sequence[Batch], initial: Initial) -> list[Tensor]:
        """Returns the reference's log-probability of each target, [N] for each micro-batch."""
        if self.cache is None:
            with initial():
                return self._logps(parts)
        keys = [answer_keys(part) for part in parts]
        known = [self.cache.find(each) for each in keys]
        # Forward passes are collective, so a part is computed by all ranks or by none.
        missed = [any(ranks) for ranks in zip(*self._mesh.gather([each is None for each in known]), strict=True)]
        computed: Iterator[Tensor] = iter(())
        if any(missed):
            with initial():
                computed = iter(self._logps([part for part, miss in zip(parts, missed, strict=True) if miss]))
        references = []
        for part, own, values, miss in zip(parts, keys, known, missed, strict=True):
            logps_N = next(computed) if miss else None
            tokens = AnswerTokens.of(part)
            if values is None:
                assert logps_N is not None
                lengths = tokens.lengths[part.answers()].tolist()
                found = np.split(logps_N[tokens.rows].float().cpu().numpy(), np.cumsum(lengths)[:-1])
                self.cache.add(own, found[: len(own)])
            else:
                logps_N = torch.zeros(len(tokens.targets), device=tokens.targets.device)
                logps_N[tokens.rows] = torch.from_numpy(np.concatenate(values)).to(logps_N) if values else logps_N[:0]
            references.append(logps_N)
        return references

    def _logps(self, parts: Sequence[Batch]) -> list[Tensor]:
        """Returns the log-probability of each target, [N] for each micro-batch."""
        return self._evaluate(parts, self._pass)

    def _evaluate(self, parts: Sequence[Batch], function: Callable[[Batch], _Result]) -> list[_Result]:
        was_training = self.module.training
        self.module.eval()
        try:
            return [call_outside_step(self.module, function, part) for part in parts]
        finally:
            self.module.train(was_training)

    def _pass(self, part: Batch) -> Tensor:
        return answer_logps(self.module.model, part, AnswerTokens.of(part).targets)

    def _read_states(self, part: Batch) -> dict[str, Tensor]:
        """Returns the columns of a loss that compares distributions with those of the reference."""
        model = self.module.model
        hidden_NH = forward_hidden(model, part)[0]
        logps_N = through_head(model, head_logps, hidden_NH, AnswerTokens.of(part).targets)
        return {**with_reference(logps_N, part), "reference_states": hidden_NH[None]}

    def state_dict(self) -> dict[str, Any]:
        """Returns the counter of the sampler, and the files of the cache, which it completes."""
        if self.cache is None:
            return super().state_dict()
        self.cache.flush()
        files = sorted({name for names in self._mesh.gather(self.cache.files) for name in names})
        return {**super().state_dict(), "files": files}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the counter of the sampler, and reads the cache as it was."""
        super().load_state_dict(state)
        if self.cache is not None and not self._is_complete:
            self.cache.limit(state.get("files", self.cache.files))


class JudgedObjective(PreferenceObjective):
    """Judged answers, with what their log-ratios or rewards are compared with as a column.

    Args:
        module: Computes the loss.
        arguments: As for :class:`PackedObjective`.
        baseline: ``mismatched``: the mean log-ratio of answers to other prompts, over the whole step and at least 0.
            ``running``: the mean of the rewards of all earlier steps. ``none``: 0.
        sequences: The documents of the training data.
        seed: Decides on the mismatches.
        options: As for :class:`PreferenceObjective`.
    """

    def __init__(
        self,
        module: StepModule,
        *arguments: Any,
        baseline: Literal["mismatched", "running", "none"],
        sequences: Sequences,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(module, *arguments, **options)
        self._baseline, self._sequences, self._seed = baseline, sequences, seed
        self._mismatches: dict[bool, Mismatches] = {}
        self._mixed: list[Batch] = []
        self._reward_sum = self._num_rewards = 0.0

    def next_batches(self) -> Sequence[Batch]:
        """Returns this rank's micro-batches of the next step, and keeps their mismatches."""
        self._mixed = []
        return super().next_batches()

    def held_out_batches(self) -> Iterator[tuple[Indices, Batch]]:
        """Yields this rank's micro-batches of the held-out documents, and keeps their mismatches."""
        self._mixed = []
        yield from super().held_out_batches()

    def _collate(self, dataset: TokenDataset, parts: Sequence[Any], other: Any) -> Batch:
        batch = super()._collate(dataset, parts, other)
        if self._baseline == "mismatched":
            self._mixed.append(self._mix(dataset, parts) if parts else batch)
        return batch

    def _mix(self, dataset: TokenDataset, parts: Sequence[Any]) -> Batch:
        """Returns the mismatches of a micro-batch."""
        is_held_out = self._held_out is not None and parts[0].epoch < 0
        if is_held_out not in self._mismatches:
            sequences = self._held_out.sequences if is_held_out and self._held_out else self._sequences
            self._mismatches[is_held_out] = Mismatches(dataset, sequences, self._seed, self._documents_per_sample)
        places = [Place(part.epoch, int(document)) for part in parts for document in part.documents]
        samples = list(self._mismatches[is_held_out].samples(place.document for place in places))
        made = samples if self.corrupt is None else self.corrupt(samples, places)
        return round_up(collate(made)).to(self._mesh.device)

    def _further_parts(self) -> Sequence[Batch]:
        """Returns the mismatches."""
        return self._mixed

    def prepare(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        """Adds the log-probabilities of the reference and the baselines."""
        prepared = super().prepare(parts)
        match self._baseline:
            case "none":
                return prepared
            case "running":
                baseline = self._reward_sum / self._num_rewards if self._num_rewards else 0.0
                self._measured |= {"delta": baseline}
            case "mismatched":
                baseline = max(0.0, self._measure(len(parts)))
        columns = [torch.full((len(part.cu_seqlens) - 1,), baseline, device=part.cu_seqlens.device) for part in parts]
        return [_with(part, {"baselines": column}) for part, column in zip(prepared, columns, strict=True)]

    def _measure(self, num_parts: int) -> float:
        """Returns the mean log-ratio of the mismatches of the step, over all ranks."""
        splits = max(1, num_parts // max(1, len(self._mixed)))  # as memory splits the step
        pieces = [piece for batch in self._mixed for piece in batch.split(splits)]
        # Ranks gather weights together, so all make as many passes; further ones count for nothing.
        passes = pieces + pieces[:1] * (max(self._mesh.gather(len(pieces))) - len(pieces))
        references = super().prepare(passes)
        own = {"sum": 0.0, "squares": 0.0, "answers": 0.0}
        for piece, logps_N in list(zip(references, self._logps(passes), strict=True))[: len(pieces)]:
            tokens = AnswerTokens.of(piece)
            ratios_D = tokens.by_document(log_ratios(logps_N[tokens.rows], piece, tokens)).sum(1)
            ratios = ratios_D[tokens.lengths > 0].double()
            own["sum"] += float(ratios.sum())
            own["squares"] += float((ratios**2).sum())
            own["answers"] += len(ratios)
        total = self._mesh.reduce(own)
        count = total["answers"] or 1.0
        mean = total["sum"] / count
        variance = max(0.0, total["squares"] / count - mean**2)
        self._measured |= {"kl": mean, "kl_stderr": (variance / count) ** 0.5}
        return mean

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Returns the means of the classes, their difference, and what was measured before the step."""
        means = super().metrics(sums, counts)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def after_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Adds the rewards of the step to their running mean."""
        self._reward_sum += sums["rewards/chosen"] + sums["rewards/rejected"]
        self._num_rewards += counts["answers"]

    def state_dict(self) -> dict[str, Any]:
        """Returns the counter of the sampler, and the sum and the number of rewards so far."""
        return {**super().state_dict(), "reward_sum": self._reward_sum, "num_rewards": self._num_rewards}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._reward_sum, self._num_rewards = float(state["reward_sum"]), float(state["num_rewards"])


def _with(part: Batch, columns: Mapping[str, Tensor]) -> Batch:
    return replace(part, columns={**part.columns, **columns})
