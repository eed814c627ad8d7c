"""``evaluate:`` a task: prompts, references and the metrics that compare answers with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.data import ControlTokens, Sources
from ingle.config.section import BatchSize, Count, Section, Seed, Strings

MetricName = Literal["exact_match", "bleu", "chrf", "rouge_l", "perplexity", "bits_per_byte"]


class TaskConfig(Section):
    """A task: held-out prompts with one or more reference answers each.

    Attributes:
        sources: Held-out rows, read as ``data.sources`` is. A row may give several answers: a ``references``
            list, or several rows with the same prompt when ``group_by_prompt`` is set.
        metrics: What to compute; the first is the headline.
        group_by_prompt: Rows with an equal prompt become one sample with several references.
        num_samples: Score only this many samples, drawn with ``seed``; all when null.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Nucleus sampling when ``temperature`` is above 0.
        stop: Strings that end an answer, in addition to the end-of-turn token.
        answer_pattern: A regular expression whose first group (last match) is compared by ``exact_match``.
        system: A system message put before prompts that have none.
        control_tokens: As ``data.control_tokens``, for prompts and references; ``keep`` goes with ``keep``.
        batch_size: Answers generated at once.
        num_shown: Side-by-side answers printed and put into the report.
        seed: Of sampling and of the statistics.
    """

    sources: Sources
    metrics: Annotated[tuple[MetricName, ...], Strict(False), Field(min_length=1)] = ("chrf", "bleu", "rouge_l")
    group_by_prompt: bool = False
    num_samples: Count | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 128
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Strings = ()
    answer_pattern: str | None = None
    system: str | None = None
    control_tokens: ControlTokens = "escape"
    batch_size: BatchSize = 32
    num_shown: Annotated[int, Field(ge=0, le=10_000)] = 3
    seed: Seed = 0
