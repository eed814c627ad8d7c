"""``evaluate:`` validation during training, and a task: prompts, reference answers and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field, Strict

from ingle.config.data import ControlTokens, OptionalSources, Sources
from ingle.config.objective import Answer, Classify, Mlm, ObjectiveConfig, ObjectiveKind, Span, Tag
from ingle.config.policy import Rewarded
from ingle.config.preferences import Reward
from ingle.config.rewards import ModelReward, OptionalRewards
from ingle.config.section import BatchSize, Count, Section, Seed, Strings

_TextMetric = Literal["exact_match", "bleu", "chrf", "rouge_l", "reward", "perplexity", "bits_per_byte"]
_ClassMetric = Literal[
    "accuracy",
    "f1_macro",
    "f1_micro",
    "f1_weighted",
    "matthews",
    "log_loss",
    "roc_auc",
    "pearson",
    "spearman",
    "mse",
]
_TagMetric = Literal["tag_accuracy", "entity_f1", "entity_f1_macro"]
_AnswerMetric = Literal["squad_em", "squad_f1"]
_MaskedMetric = Literal["masked_accuracy", "masked_perplexity"]
MetricName = Literal[_TextMetric, _ClassMetric, _TagMetric, _AnswerMetric, _MaskedMetric]

#: Metrics of generated text, unless a task names others.
TEXT_METRICS: tuple[MetricName, ...] = ("chrf", "bleu", "rouge_l")

#: Metrics of answers and of the likelihoods of references.
_OF_TEXT = frozenset[MetricName]((*get_args(_TextMetric), *get_args(_AnswerMetric)))
#: The metrics that a model of each objective can be scored by.
METRICS_OF: Mapping[ObjectiveKind, frozenset[MetricName]] = {
    **dict.fromkeys(("clm", "sft", "span", "seq2seq"), _OF_TEXT),
    "mlm": frozenset(get_args(_MaskedMetric)),
    "classify": frozenset(get_args(_ClassMetric)),
    "tag": frozenset(get_args(_TagMetric)),
    "answer": _OF_TEXT - {"perplexity", "bits_per_byte"},
    "reward": frozenset(("accuracy", "log_loss")),
    "dpo": _OF_TEXT,
    "kto": _OF_TEXT,
    "orpo": _OF_TEXT,
    "simpo": _OF_TEXT,
    "cpo": _OF_TEXT,
    "bco": _OF_TEXT,
    **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "online_dpo", "raft", "distill"), _OF_TEXT),
}

#: How tags are read as entities.
TagScheme = Literal["auto", "iob1", "iob2", "ioe1", "ioe2", "iobes", "bilou"]


class TaskConfig(Section):
    """A task: held-out prompts with one or more reference answers each.

    Attributes:
        sources: Held-out rows, in the same layouts as ``data.sources``. To give several reference answers per prompt,
            use a ``references`` column, or several rows with the same prompt and ``group_by_prompt``.
        metrics: Metrics to compute. The first one is the headline. If null, those that suit the objective: chrF, BLEU
            and ROUGE-L for generated text.
        group_by_prompt: Combine rows with the same prompt into one sample with several references.
        num_samples: Score a random subset of this many samples, drawn with ``seed``. If null, score all.
        max_new_tokens: Longest answer in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus sampling: sample from the most likely tokens that together have this probability. Needs a
            ``temperature`` above 0.
        stop: Strings that end an answer, in addition to the end-of-turn token.
        rewards: What the metric ``reward`` adds up, as in ``objective.rewards``. If empty, those of the objective
            itself, without trained reward models.
        answer_pattern: Regular expression that extracts the answer for ``exact_match``: the first group of its last
            match.
        tag_scheme: How tags are read as entities. ``auto`` also reads sequences that break every scheme, such as
            ``I-PER`` after ``O``, as conlleval does; a scheme ignores entities that it does not allow.
        system: System message for prompts that have none.
        control_tokens: How to read control tokens in prompts and references, as ``data.control_tokens``. If one of the
            two is ``keep``, both must be.
        batch_size: Number of answers generated together.
        num_shown: Number of side-by-side answers on the terminal and in the report.
        seed: Seed of sampling and of the statistics.
    """

    sources: Sources
    metrics: Annotated[tuple[MetricName, ...], Strict(False), Field(min_length=1)] | None = None
    group_by_prompt: bool = False
    num_samples: Count | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 128
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Strings = ()
    rewards: OptionalRewards = ()
    answer_pattern: str | None = None
    tag_scheme: TagScheme = "auto"
    system: str | None = None
    control_tokens: ControlTokens = "escape"
    batch_size: BatchSize = 32
    num_shown: Annotated[int, Field(ge=0, le=10_000)] = 3
    seed: Seed = 0


def suit_task(task: TaskConfig, objective: ObjectiveConfig) -> TaskConfig:
    """Returns a task with the metrics, rewards and the tag scheme that suit an objective, where it names none."""
    scheme = objective.scheme if isinstance(objective, Tag) and task.tag_scheme == "auto" else task.tag_scheme
    own = objective.rewards if isinstance(objective, Rewarded) else ()
    rewards = task.rewards or tuple(reward for reward in own if not isinstance(reward, ModelReward))
    metrics = task.metrics or suitable_metrics(objective)
    if not task.metrics and rewards:
        metrics = ("reward", *metrics)
    return task.model_copy(update={"metrics": metrics, "rewards": rewards, "tag_scheme": scheme})


def suitable_metrics(objective: ObjectiveConfig) -> tuple[MetricName, ...]:
    """Returns the metrics of a task that names none."""
    match objective:
        case Classify(problem="regression"):
            return ("spearman", "pearson", "mse")
        case Classify(problem="multi"):
            return ("f1_micro", "f1_macro", "accuracy", "log_loss")
        case Classify():
            return ("accuracy", "f1_macro", "matthews", "log_loss")
        case Tag(labels=labels) if labels is not None and "O" not in labels:
            return ("tag_accuracy",)
        case Tag():
            return ("entity_f1", "tag_accuracy")
        case Answer():
            return ("squad_f1", "squad_em")
        case Mlm():
            return ("masked_accuracy", "masked_perplexity")
        case Span():
            return ("perplexity",)
        case Reward():
            return ("accuracy",)
    return TEXT_METRICS


class EvaluateConfig(TaskConfig):
    """Validation during training, and the task after it.

    Attributes:
        sources: Held-out rows of the task, in the same layouts as ``data.sources``. Without them, the run has no task:
            only the loss on ``data.validation`` is measured.
        every: Steps between validations, or the share of an epoch (``0.5``: twice per epoch). If null, ten times per
            run. Needs ``data.validation``.
        num_validation_samples: Answer this many samples of the task at each validation too, and log its metrics; 0 for
            none. They do not influence which step is kept.
    """

    sources: OptionalSources = ()
    every: Annotated[int, Field(ge=1, le=1_000_000_000)] | Annotated[float, Field(gt=0, le=1)] | None = None
    num_validation_samples: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    @property
    def task(self) -> TaskConfig | None:
        """The task alone; None without sources."""
        if not self.sources:
            return None
        return TaskConfig.model_construct(**{name: getattr(self, name) for name in TaskConfig.model_fields})
