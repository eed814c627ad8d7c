"""Measures preferences under the model that training would begin with, for ``ingle data inspect --margins``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ingle.assembly import assemble
from ingle.config.adapter import LoraAdapter, NoAdapter
from ingle.config.objective import FAMILY
from ingle.config.preferences import Dpo
from ingle.config.run import Run
from ingle.errors import ConfigError
from ingle.evaluation.statistics.intervals import wilson
from ingle.events import Progress, Sink
from ingle.objectives import PreferenceObjective
from ingle.objectives.answers import AnswerTokens, find_pairs, log_ratios
from ingle.objectives.reference_cache import answer_keys

#: Shares of the pairs whose margins are shown.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Margins:
    """How the reference itself judges pairs; a margin is log p of the chosen answer less that of the rejected one.

    Attributes:
        pairs: Number of pairs; of a row of several answers, the best and the worst one.
        accuracy: Share in which the chosen answer is more likely, in nats per answer, with its 95 % interval.
        accuracy_per_token: The same for means over the tokens of an answer.
        quantiles: Margins per answer at :data:`QUANTILES`, in nats.
        quantiles_per_token: Margins of the means per token.
    """

    pairs: int
    accuracy: tuple[float, float, float]
    accuracy_per_token: tuple[float, float, float]
    quantiles: tuple[float, ...]
    quantiles_per_token: tuple[float, ...]


def measure_margins(run: Run, num_rows: int, sink: Sink) -> Margins:
    """Computes the margins of about ``num_rows`` rows, and keeps the values of the reference for training.

    Raises:
        ConfigError: The rows have no pairs.
    """
    if FAMILY[run.objective.kind] not in ("pairs", "reward"):
        raise ConfigError(
            f"{run.objective.kind} learns from single answers, which have no margin.",
            where="--margins, objective.kind",
            fix="--objective.kind=dpo",
        )
    # A new adapter begins at its base, which is what full fine-tuning begins with.
    adapter = LoraAdapter() if isinstance(run.adapter, NoAdapter) else run.adapter
    run = run.model_copy(update={"objective": Dpo(kind="dpo"), "adapter": adapter, "evaluate": None})
    objective = assemble(run, sink).objective
    assert isinstance(objective, PreferenceObjective)
    found: dict[tuple[bytes, ...], tuple[float, ...]] = {}  # the last step of an epoch goes on with the next one
    with torch.no_grad():
        while len(found) < num_rows and objective.epoch < 1:
            for part in objective.prepare(objective.next_batches()):
                tokens = AnswerTokens.of(part)
                logps_M = -log_ratios(torch.zeros(len(tokens.rows), device=tokens.rows.device), part, tokens)
                sums_D = tokens.by_document(logps_M).sum(1).double()
                means_D = sums_D / tokens.lengths.clamp_min(1)
                pairs = find_pairs(part, tokens.lengths > 0, "best_worst")
                sides = [each[pairs.chosen] - each[pairs.rejected] for each in (sums_D, means_D)]
                keys = dict(zip(part.answers().tolist(), answer_keys(part), strict=True))
                names = [tuple(keys[d] for d in pair) for pair in zip(*map(Tensor.tolist, pairs[:2]), strict=True)]
                found |= dict(zip(names, zip(*map(Tensor.tolist, sides), strict=True), strict=True))
            sink(Progress("Margins", min(len(found), num_rows), num_rows))
    objective.state_dict()  # writes the values of the reference
    table_P2 = np.array(list(found.values()))
    shares = [wilson(int((column > 0).sum()), len(column)) for column in table_P2.T]
    means = [float((column > 0).mean()) for column in table_P2.T]
    accuracies = [(mean, share.low, share.high) for mean, share in zip(means, shares, strict=True)]
    quantiles = [tuple(map(float, np.quantile(column, QUANTILES))) for column in table_P2.T]
    return Margins(len(table_P2), accuracies[0], accuracies[1], quantiles[0], quantiles[1])


def describe(margins: Margins) -> list[str]:
    """Returns the lines of a report."""
    lines = [f"Margins of {margins.pairs:,} pairs under the model that training begins with"]
    kinds = (
        ("answer", margins.accuracy, margins.quantiles),
        ("token", margins.accuracy_per_token, margins.quantiles_per_token),
    )
    for unit, (share, low, high), values in kinds:
        shown = ", ".join(f"{value:+.3g} ({at:.0%})" for at, value in zip(QUANTILES, values, strict=True))
        lines.append(
            f"  chosen is more likely per {unit}: {share:.1%} [{low:.1%}, {high:.1%}]; nats per {unit}: {shown}"
        )
    return lines
