"""Samples the answers of an iteration and scores them.

Each rank answers the prompts whose number is its own modulo the number of ranks; then all ranks have all answers.

Legend: R answers, F rewards, G answers to a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ingle import stopping
from ingle.data import PromptSet, SequenceSampler
from ingle.events import Progress, Sampled, Sink, Warned
from ingle.models import Request, Rollout, Sampler
from ingle.objectives.reward_models import RewardModel
from ingle.objectives.rollouts.advantages import Floats
from ingle.objectives.rollouts.alarms import describe_answers, mean_figures
from ingle.objectives.rollouts.answered import (
    FINISHED,
    STATUSES,
    Answered,
    Asked,
    finished,
    joined,
    make_buffer,
    pick,
    selected,
)
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.objectives.rollouts.journal import Journal
from ingle.objectives.rollouts.recipes import Recipe
from ingle.parallel import Mesh
from ingle.rewards import Group, RewardPool, Scores, check_failed

#: Seconds between two looks at whether the run is to stop.
_POLL_S = 0.05

#: Draws of held-out prompts begin here; a run never gets so far.
_FIRST_HELD_OUT = 1 << 40
#: Figures of held-out prompts.
HELD_OUT = ("reward", "response_tokens", "unfinished")


class Iteration(NamedTuple):
    """What the answers of an iteration depend on.

    Attributes:
        number: Its number, from 0.
        draw: The first prompt to draw.
        num_prompts: Prompts to answer.
        step: The step that needs the answers.
        trail: Names the weights.
    """

    number: int
    draw: int
    num_prompts: int
    step: int
    trail: str


class Collector:
    """Samples answers and scores them.

    Args:
        prompts: The prompts.
        order: The order in which they are drawn.
        make_sampler: Returns the sampler; called once the weights are there.
        make_pool: Returns what scores answers in other processes; None without rewards.
        models: Trained reward models, by the number of their reward.
        names: Names of the rewards.
        tokenizer: The model's tokenizer.
        num_generations: Answers to each prompt.
        max_new_tokens: Longest answer.
        refill: Further prompts, in multiples of those of an iteration, in the place of those that teach nothing.
        stop: Strings that end an answer.
        max_failed: Largest share of the answers that may have no score by mistake.
        num_shown: Answers to report in each iteration.
        num_steps: Steps of the run, which reward functions receive.
        origin: What answers depend on, next to weights and prompts, as plain values.
        folder: Where journals are kept.
        mesh: The ranks.

    Attributes:
        folder: As above.
        num_prompts: Number of prompts.
        names: Names of the rewards.
        models: As above.
    """

    def __init__(
        self,
        prompts: PromptSet,
        order: SequenceSampler,
        *,
        make_sampler: Callable[[], Sampler],
        make_pool: Callable[[], RewardPool] | None,
        models: Mapping[int, RewardModel],
        names: Sequence[str],
        tokenizer: Any,
        num_generations: int,
        max_new_tokens: int,
        refill: int,
        stop: Sequence[str],
        max_failed: float,
        num_shown: int,
        num_steps: int,
        origin: Mapping[str, Any],
        folder: Path,
        mesh: Mesh,
    ) -> None:
        self.folder, self.num_prompts = folder, len(order)
        self.names = tuple(names)
        self._prompts, self._order = prompts, order
        self._make_sampler, self._make_pool, self.models = make_sampler, make_pool, models
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop)
        self._num_generations, self._max_new_tokens = num_generations, max_new_tokens
        self._refill, self._max_failed, self._num_shown = refill, max_failed, num_shown
        self._num_steps, self._origin, self._mesh = num_steps, origin, mesh
        self._sampler: Sampler | None = None
        self._pool: RewardPool | None = None
        self._opened = ExitStack()
        self._reported: set[str] = set()

    def collect(
        self, iteration: Iteration, recipe: Recipe, sink: Sink
    ) -> tuple[SampleBuffer, int, dict[str, float]] | None:
        """Returns the answers of an iteration with their rewards, the next prompt to draw, and figures.

        None if a rank was asked to stop.

        Raises:
            RewardError: Too many answers could not be scored.
        """
        self._open(sink)
        origin = {**self._origin, "trail": iteration.trail, "draw": iteration.draw}
        journal = Journal(self.folder, iteration.number, origin, self._mesh.dist_rank)
        wanted = missing = iteration.num_prompts
        extra, draw, times = self._refill * wanted, iteration.draw, {"rollout_s": 0.0, "score_s": 0.0}
        state = self._state(iteration.step - 1, iteration.draw)
        parts: list[Answered] = []
        while True:
            asked = [Asked(number, self._row(number)) for number in range(draw, draw + missing)]
            found = self.answer(self._prompts, asked, self._num_generations, journal, times, state, sink)
            if found is None:
                return None
            draw += missing
            parts.append(found)
            whole = joined(parts)
            self._check(whole, sink)
            buffer, raw_R = self._reward(whole, recipe)
            teaches_R = recipe.teaches(buffer)
            useful = int(teaches_R.sum()) // self._num_generations
            missing = min(wanted - useful, extra)
            if missing <= 0:
                break
            extra -= missing
        if self.names and np.isnan(raw_R).all():
            text = f"No answer of iteration {iteration.number + 1} has a reward, so its steps teach nothing."
            self._warn_once("", text, sink)
        figures = self._describe(buffer, raw_R, whole) | {
            "zero_spread": 1 - useful * self._num_generations / len(buffer),
            "discarded": float(draw - iteration.draw - wanted),
            "rollouts_per_s": len(buffer) / max(times["rollout_s"], 1e-9),
        }
        if len(parts) > 1:
            rows = pick(teaches_R, self._num_generations, wanted)
            buffer, raw_R = self._reward(selected(whole, rows), recipe)
        self._show(buffer, raw_R, iteration, sink)
        return buffer, draw, figures | times

    def answer(
        self,
        prompts: PromptSet,
        asked: Sequence[Asked],
        num_generations: int,
        journal: Journal | None,
        times: dict[str, float],
        state: Mapping[str, float],
        sink: Sink,
    ) -> Answered | None:
        """Samples and scores answers to prompts; None if a rank was asked to stop.

        Args:
            prompts: The prompts.
            asked: Which ones; equal on all ranks.
            num_generations: Answers to each.
            journal: Knows answers and scores that are there already, and keeps new ones.
            times: Seconds of sampling and scoring, to which those of this call are added.
            state: The progress that reward functions receive.
            sink: Receives progress.
        """
        self._open(sink)
        assert self._sampler is not None
        if not self._sampler.is_invariant:
            journal = None  # the other answers could come out otherwise, and their scores are not those of these
        began = time.monotonic()
        rollouts = self._sample(prompts, asked, num_generations, journal, sink)
        if rollouts is None:
            return None
        buffer = make_buffer(prompts, asked, rollouts)
        sampled = time.monotonic()
        groups = self._score(prompts, asked, num_generations, rollouts, journal, state, sink)
        if groups is None:
            return None
        scores_RF = np.concatenate([group.values for group in groups])
        for number, score in self.models.items():
            scores_R = score(buffer)
            if scores_R is None:
                return None
            scores_RF[:, number] = scores_R
        times["rollout_s"] = times.get("rollout_s", 0.0) + sampled - began
        times["score_s"] = times.get("score_s", 0.0) + time.monotonic() - sampled
        for line in (line for group in groups for line in group.printed):
            sink(Warned(f"A reward function printed: {line}", where="objective.rewards"))
        return Answered(buffer, scores_RF, groups)

    def _open(self, sink: Sink) -> None:
        if self._sampler is not None:
            return
        # One process may stop anywhere in here: it has made no step yet. Ranks could wait for one that has stopped.
        with stopping.at_once() if self._mesh.world_size == 1 else nullcontext():
            sampler = self._make_sampler()
            if sampler.note:
                sink(Warned(sampler.note, where="objective.rollout"))
            with self._mesh.together():
                if self._make_pool is not None:
                    self._pool = self._opened.enter_context(self._make_pool())
        self._sampler = sampler

    def close(self) -> None:
        """Ends the processes that score answers."""
        self._opened.close()
        self._sampler = self._pool = None

    def _state(self, step: int, draw: int) -> dict[str, float]:
        """Returns what reward functions receive about the run after so many steps and prompts."""
        return {"global_step": step, "max_steps": self._num_steps, "epoch": draw / self.num_prompts}

    def _row(self, draw: int) -> int:
        (documents,) = self._order.take(draw, 1)
        return int(documents[0])

    def _own(self, asked: Sequence[Asked]) -> list[Asked]:
        """Returns the prompts of this rank."""
        return [each for each in asked if each.draw % self._mesh.world_size == self._mesh.dist_rank]

    def _sample(
        self, prompts: PromptSet, asked: Sequence[Asked], num_generations: int, journal: Journal | None, sink: Sink
    ) -> dict[tuple[int, int], Rollout] | None:
        """Returns the answers of all ranks by draw and number; None if a rank was asked to stop."""
        assert self._sampler is not None
        known = journal.rollouts if journal is not None else {}
        wanted = [(each, number) for each in self._own(asked) for number in range(num_generations)]
        own = {(each.draw, number): known[each.draw, number] for each, number in wanted if (each.draw, number) in known}
        requests = [
            Request(each.draw, number, prompts.ids(each.row).tolist(), self._max_new_tokens)
            for each, number in wanted
            if (each.draw, number) not in own
        ]
        running = self._sampler.run(requests, stop=_must_stop)
        for done, rollout in enumerate(running, 1):
            own[rollout.draw, rollout.answer] = rollout
            if journal is not None:
                journal.add_rollout(rollout)
            sink(Progress("Sampling answers", done, len(requests)))
        if self._mesh.agree(len(own) < len(wanted)):
            return None
        return {key: rollout for part in self._mesh.gather(own) for key, rollout in part.items()}

    def _score(
        self,
        prompts: PromptSet,
        asked: Sequence[Asked],
        num_generations: int,
        rollouts: Mapping[tuple[int, int], Rollout],
        journal: Journal | None,
        state: Mapping[str, float],
        sink: Sink,
    ) -> list[Scores] | None:
        """Returns the scores of all groups, in their order; None if a rank was asked to stop."""
        if self._pool is None:
            return [Scores(np.zeros((num_generations, 0)), ((),) * num_generations) for _ in asked]
        known = {} if journal is None else dict(journal.scores)
        waiting = {}
        for each in self._own(asked):
            if each.draw not in known:
                answers = [rollouts[each.draw, number] for number in range(num_generations)]
                waiting[each.draw] = self._pool.submit(self._group(prompts, each.row, answers, state))
        own = {each.draw: known[each.draw] for each in self._own(asked) if each.draw in known}
        with self._mesh.together():
            for done, (draw, outcome) in enumerate(waiting.items(), 1):
                while not outcome.is_done() and not _must_stop():
                    time.sleep(_POLL_S)
                if not outcome.is_done():
                    break
                own[draw] = outcome.take()
                if journal is not None:
                    journal.add_scores(draw, own[draw])
                sink(Progress("Scoring answers", done, len(waiting)))
        if self._mesh.agree(len(own) < len(self._own(asked))):
            return None
        found = {draw: scores for part in self._mesh.gather(own) for draw, scores in part.items()}
        return [found[each.draw] for each in asked]

    def _group(self, prompts: PromptSet, row: int, answers: Sequence[Rollout], state: Mapping[str, float]) -> Group:
        return Group(
            prompts.prompt(row),
            [self.text(each) for each in answers],
            [each.ids.tolist() for each in answers],
            prompts.columns(row),
            [each.status in FINISHED for each in answers],
            state,
        )

    def text(self, rollout: Rollout) -> str:
        """Returns an answer as text: without special tokens, and up to a stop string."""
        ids = rollout.ids[:-1] if rollout.status == "stop" else rollout.ids
        text = str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        cuts = [place for place in map(text.find, self._stop_strings) if place >= 0]
        return text[: min(cuts)] if cuts else text

    def measure(self, prompts: PromptSet, rows: Sequence[int], recipe: Recipe, sink: Sink) -> Floats | None:
        """Answers held-out prompts once; returns what :data:`HELD_OUT` names and each reward, [D, 3 + F].

        NaN stands for what is not known. The noise of the answers is the same in every call, so that two measurements
        differ by the weights alone. None if a rank was asked to stop.
        """
        asked = [Asked(_FIRST_HELD_OUT + row, row) for row in rows]
        found = self.answer(prompts, asked, 1, None, {}, self._state(0, 0), sink)
        if found is None:
            return None
        self._check(found, sink)
        _, raw_R = self._reward(found, recipe)
        lengths_R, unfinished_R = found.buffer["lengths"], ~finished(found.buffer)
        return np.column_stack([raw_R, lengths_R, unfinished_R, found.scores]).astype(np.float64)

    def _check(self, answered: Answered, sink: Sink) -> None:
        """Ends the run if too many answers have no score, and says so once if a few have none."""
        for name, text in check_failed(answered.groups, self.names, self._max_failed).items():
            self._warn_once(name, text, sink)

    def _warn_once(self, about: str, text: str, sink: Sink) -> None:
        if about not in self._reported:
            sink(Warned(text, where="objective.rewards"))
            self._reported.add(about)

    def _reward(self, answered: Answered, recipe: Recipe) -> tuple[SampleBuffer, Floats]:
        return recipe.reward(answered.buffer, answered.scores, finished(answered.buffer))

    def _describe(self, buffer: SampleBuffer, raw_R: Floats, answered: Answered) -> dict[str, float]:
        """Returns figures of answers and rewards; without those that nothing is known about."""
        figures = {
            "response_tokens": float(buffer["lengths"].mean()),
            "entropy": float(buffer["entropies"].mean()),
            "unfinished": float((~finished(buffer)).mean()),
        }
        if self.names:
            draws_R = buffer["draws"]
            for name, each in zip(self.names, answered.scores.T, strict=True):
                figures |= mean_figures(f"rewards/{name}", each, draws_R)
            figures |= mean_figures("reward", raw_R, draws_R)
            figures |= {"reward_std": float(np.nanstd(raw_R))} if "reward" in figures else {}
            figures |= describe_answers(buffer.by_answer("ids"), raw_R, draws_R)
            figures["unscored"] = float(np.isnan(raw_R).mean())
        logged: dict[str, list[float]] = {}
        for group in answered.groups:
            for name, value in group.metrics.items():
                logged.setdefault(f"logged/{name}", []).append(value)
        figures |= {name: sum(values) / len(values) for name, values in logged.items()}
        return {name: value for name, value in figures.items() if np.isfinite(value)}

    def _show(self, buffer: SampleBuffer, raw_R: Floats, iteration: Iteration, sink: Sink) -> None:
        """Reports some answers, each to another prompt where there are enough."""
        starts = np.flatnonzero(np.diff(buffer["draws"], prepend=-1))[: self._num_shown]
        ids = buffer.by_answer("ids")
        samples = []
        for row in starts.tolist():
            status = STATUSES[buffer["statuses"][row]]
            rollout = Rollout(0, 0, ids[row], np.zeros(0, np.float32), np.zeros(0, np.float32), status)
            prompt = buffer.by_answer("prompt_ids")[row].tolist()
            reward = None if np.isnan(raw_R[row]) else float(raw_R[row])
            shown = {"prompt": str(self._tokenizer.decode(prompt)), "answer": self.text(rollout), "status": status}
            samples.append({**shown, "reward": reward})
        if samples:
            sink(Sampled(iteration.step, iteration.number, tuple(samples)))


def _must_stop() -> bool:
    return stopping.requested() is not None
