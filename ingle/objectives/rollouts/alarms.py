"""Alarms: signs that a policy learns to please the reward instead of doing the task.

Everything here is a function of the figures of iterations, with the state that a checkpoint needs.

Legend: R answers, T tokens of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import atanh, isfinite, sqrt
from typing import Any, NamedTuple

import numpy as np

from ingle.config.policy import AlarmConfig
from ingle.objectives.rollouts.advantages import Floats, Integers

#: Iterations in a row for which a sign has to last.
PATIENCE = 3
#: Iterations that means of rewards are taken over, at most: they differ by chance from one to the next.
_WINDOW = 8
#: Standard errors by which a figure has to exceed chance.
_ERRORS = 2.0
#: The same for the fall of a proxy from its best value, which is the largest of many.
_FALL_ERRORS = 5.0
#: Tokens of the n-grams whose repetition is counted.
_NGRAM = 4
#: Odd numbers by which n-grams are hashed.
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 1], np.uint64)


class Alarm(NamedTuple):
    """A sign that has lasted.

    Attributes:
        name: Its name in ``objective.alarms``.
        stops: Whether it ends the run.
        message: What was seen, as a sentence.
        since: The first iteration of the sign, from 0.
        fix: What to do.
    """

    name: str
    stops: bool
    message: str
    since: int
    fix: str


def describe_answers(ids: Sequence[Integers], rewards_R: Floats, groups_R: Integers) -> dict[str, float]:
    """Returns the figures of answers that alarms read, without those that nothing is known about.

    Args:
        ids: The tokens of each answer, [R] of [T].
        rewards_R: Rewards; NaN for none.
        groups_R: Number of the prompt of each answer.

    Returns:
        ``repetition``: mean share of the 4-grams of an answer that repeat an earlier one. ``identical``: mean share of
        the most frequent answer to a prompt, over prompts with several answers. ``length_correlation``: correlation of
        reward and length within the answers to a prompt; ``length_correlation_low`` and ``_high``: two standard errors
        around it (Fisher's z).
    """
    figures = {"repetition": float(np.mean([_repetition(each) for each in ids]))}
    shares = []
    for group in np.unique(groups_R):
        rows = np.flatnonzero(groups_R == group).tolist()
        if len(rows) > 1:
            (_, count), *_ = Counter(ids[row].tobytes() for row in rows).most_common(1)
            shares.append(count / len(rows))
    if shares:
        figures["identical"] = float(np.mean(shares))
    lengths_R = np.array([len(each) for each in ids], np.float64)
    kept_R = ~np.isnan(rewards_R)
    return figures | _correlation(lengths_R[kept_R], rewards_R[kept_R], groups_R[kept_R])


def mean_figures(name: str, values_R: Floats, groups_R: Integers) -> dict[str, float]:
    """Returns the mean of values under ``name``, and its standard error over prompts under ``NAME_stderr``.

    The answers to a prompt are not independent, so their mean counts once. NaN is left out.
    """
    kept_R = ~np.isnan(values_R)
    if not kept_R.any():
        return {}
    figures = {name: float(values_R[kept_R].mean())}
    _, places, counts = np.unique(groups_R[kept_R], return_inverse=True, return_counts=True)
    if len(counts) > 1:
        means = np.bincount(places, values_R[kept_R]) / counts
        figures[f"{name}_stderr"] = float(means.std(ddof=1) / sqrt(len(means)))
    return figures


def _repetition(ids: Integers) -> float:
    count = len(ids) - _NGRAM + 1
    if count < 1:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), _NGRAM)
    return 1.0 - len(np.unique(windows @ _MULTIPLIERS)) / count  # one number for each n-gram, modulo 2 ** 64


def _correlation(lengths: Floats, rewards: Floats, groups: Integers) -> dict[str, float]:
    """Returns the correlation within groups and its bounds; nothing where lengths or rewards do not differ."""
    _, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    x, y = (each - (np.bincount(places, each) / counts)[places] for each in (lengths, rewards))
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    freedom = len(x) - len(counts)  # one mean per group was estimated
    if spread < 1e-12 or freedom < 4:
        return {}
    found = float(np.clip((x * y).sum() / spread, -1, 1))
    centre, error = atanh(min(max(found, -0.999999), 0.999999)), _ERRORS / sqrt(freedom - 2)
    low, high = np.tanh([centre - error, centre + error]).tolist()
    return {"length_correlation": found, "length_correlation_low": low, "length_correlation_high": high}


@dataclass(frozen=True)
class _Sign:
    """One alarm: what it sees, and what helps.

    Attributes:
        find: Returns what is wrong, given figures of this and of the first iteration; None if nothing is.
        fix: What to do.
    """

    find: Callable[[Mapping[str, float], Mapping[str, float]], str | None]
    fix: str


def _length(now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    low, high = now.get("length_correlation_low", 0.0), now.get("length_correlation_high", 0.0)
    if low > 0.5 or high < -0.5:
        longer = "longer" if low > 0.5 else "shorter"
        return f"{longer} answers get the reward (correlation within a prompt {now['length_correlation']:.2f})"
    if now.get("response_tokens", 0.0) > 1.5 * first.get("response_tokens", float("inf")):
        return f"answers grew from {first['response_tokens']:.0f} to {now['response_tokens']:.0f} tokens"
    return None


def _repeats(now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    if now.get("repetition", 0.0) > first.get("repetition", 0.0) + 0.2:
        return f"{now['repetition']:.0%} of the 4-grams of an answer repeat an earlier one"
    if now.get("identical", 0.0) > max(0.5, first.get("identical", 0.0) + 0.2):
        return f"{now['identical']:.0%} of the answers to a prompt are the same"
    return None


def _entropy(now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    if now.get("entropy", 1.0) < 0.1 * first.get("entropy", 0.0):
        return f"the entropy of a token fell from {first['entropy']:.3g} to {now['entropy']:.3g} nats"
    return None


def _mismatch(now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    if now.get("sampler_ess", 1.0) < 0.5:
        return f"answers are worth {now['sampler_ess']:.0%} of their number: the sampler has other probabilities"
    if now.get("sampler_deviation", 0.0) > 0.1:
        return f"the probabilities of the sampler differ by {now['sampler_deviation']:.1%} from those of the update"
    return None


def _idle(now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    if now.get("zero_spread", 0.0) > 0.8:
        return f"{now['zero_spread']:.0%} of the prompts have answers with equal rewards, which teach nothing"
    return None


_SIGNS: Mapping[str, _Sign] = {
    "length": _Sign(_length, "add a reward of kind overlong or length, or --objective.preset=dr_grpo"),
    "repetition": _Sign(_repeats, "add a reward of kind repetition, or raise --objective.kl.coef"),
    "entropy": _Sign(_entropy, "lower --optim.lr, or raise --objective.kl.coef or --objective.entropy_coef"),
    "mismatch": _Sign(_mismatch, "use --model.dtype=float32, or --objective.rollout.correction=truncate"),
    "idle": _Sign(_idle, "use prompts of other difficulty, more --objective.num_generations, or --objective.refill=4"),
}


class Alarms:
    """Raises alarms from the figures of each iteration.

    Args:
        config: What to watch.
        kl_limit: Divergence per answer beyond which the policy has left its bounds, in nats; None without bounds.
        proxies: Names of rewards that are measured but not learned from (their weight is 0).
    """

    def __init__(self, config: AlarmConfig, kl_limit: float | None = None, proxies: Sequence[str] = ()) -> None:
        self._actions: Mapping[str, str] = dict(config)
        self._kl_limit, self._proxies = kl_limit, tuple(proxies)
        self._first: dict[str, float] = {}
        self._since: dict[str, int] = {}
        self._means: dict[str, list[list[float]]] = {}
        self._best: dict[str, list[float]] = {}

    def update(self, iteration: int, figures: Mapping[str, float]) -> list[Alarm]:
        """Returns the alarms that this iteration raises.

        Args:
            iteration: Its number, from 0.
            figures: Its figures by name: those of :func:`describe_answers`, ``response_tokens``, ``entropy``, ``kl``
                and ``kl_stderr``, ``sampler_ess``, ``sampler_deviation``, ``zero_spread``; for proxies, ``reward``,
                ``rewards/NAME`` and their ``_stderr``. What is missing is not watched.
        """
        self._first = {name: value for name, value in figures.items() if isfinite(value)} | self._first
        raised = []
        for name, found, fix in self._look(figures):
            if found is None:
                self._since.pop(name, None)
                continue
            since = self._since.setdefault(name, iteration)
            if iteration - since == PATIENCE - 1:
                message = f"{found[0].upper()}{found[1:]}, since iteration {since + 1:,}."
                raised.append(Alarm(name, self._actions[name] == "stop", message, since, fix))
        return raised

    @property
    def is_quiet(self) -> bool:
        """Whether no alarm that would end the run has seen its sign in the last iteration."""
        return not any(self._actions[name] == "stop" for name in self._since)

    def _look(self, figures: Mapping[str, float]) -> Iterator[tuple[str, str | None, str]]:
        """Yields the name of each alarm that is on, what it sees, and what helps."""
        for name, sign in _SIGNS.items():
            if self._actions[name] != "off":
                yield name, sign.find(figures, self._first), sign.fix
        if self._actions["kl"] != "off":
            yield "kl", self._far(figures), "lower --optim.lr, or raise --objective.kl.coef or --objective.kl.budget"
        if self._actions["proxy"] != "off":
            yield "proxy", self._turned(figures), "stop here, or make the reward harder to please than to deserve"

    def _far(self, figures: Mapping[str, float]) -> str | None:
        kl, error = figures.get("kl", 0.0), figures.get("kl_stderr", 0.0)
        if self._kl_limit is not None and kl - _ERRORS * error > self._kl_limit:
            return f"the divergence from the reference is {kl:.1f} nats per answer; the limit is {self._kl_limit:.1f}"
        return None

    def _turned(self, figures: Mapping[str, float]) -> str | None:
        """Returns which proxy fell significantly below its best while the reward rose."""
        found = None
        for proxy in self._proxies:
            names = ("reward", "reward_stderr", f"rewards/{proxy}", f"rewards/{proxy}_stderr")
            if any(name not in figures for name in names):
                continue
            points = self._means.setdefault(proxy, [])
            points.append([figures[name] for name in names])
            del points[:-_WINDOW]
            if len(points) < PATIENCE:  # a proxy may fall in the first iterations
                continue
            now = _mean_points(points)
            best = self._best.setdefault(proxy, now)
            if now[2] > best[2]:
                self._best[proxy] = now
            reward_rose = now[0] - best[0] > _ERRORS * sqrt(now[1] ** 2 + best[1] ** 2)
            if reward_rose and best[2] - now[2] > _FALL_ERRORS * sqrt(now[3] ** 2 + best[3] ** 2):
                found = found or (
                    f"{proxy} fell from {best[2]:.3f} to {now[2]:.3f} while the reward rose from {best[0]:.3f} to "
                    f"{now[0]:.3f}"
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns what later iterations depend on, as JSON values."""
        return {"first": self._first, "since": self._since, "means": self._means, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._first, self._since = dict(state["first"]), dict(state["since"])
        self._means = {name: [list(point) for point in points] for name, points in state["means"].items()}
        self._best = {name: list(point) for name, point in state["best"].items()}


def _mean_points(points: Sequence[Sequence[float]]) -> list[float]:
    """Returns the means of means and their standard errors."""
    values = np.array(points)
    means, errors = values[:, ::2].mean(0), np.sqrt((values[:, 1::2] ** 2).sum(0)) / len(values)
    return [float(number) for pair in zip(means, errors, strict=True) for number in pair]
