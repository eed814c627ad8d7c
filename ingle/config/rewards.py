"""``objective.rewards:`` what a sampled answer is worth.

Every kind has a ``name`` in the metrics, a ``weight`` in the sum, and a ``time_limit_s``. A ``column`` is one of the
row of the prompt.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict

from ingle.config.section import Positive, Section, Text, one_or_more, tagged

RewardKind = Literal[
    "function",
    "exact_match",
    "number",
    "contains",
    "format",
    "length",
    "overlong",
    "repetition",
    "judge",
    "model",
]

_Weight = Annotated[float, Field(ge=-999, le=1e6)]
_Tokens = Annotated[int, Field(ge=0, le=16_777_216)]


class _Reward(Section):
    """Options of every reward.

    Attributes:
        name: Name in the metrics. If null, the name of the function, or the kind.
        weight: Factor in the sum of the rewards.
        time_limit_s: Seconds for one call: for one answer, or for all answers to a prompt if a function takes them
            together.
    """

    name: Text | None = None
    weight: _Weight = 1.0
    time_limit_s: Annotated[float, Field(gt=0, le=86_400)] = 5.0


class FunctionReward(_Reward):
    """A Python function with the signature that TRL or verl calls, or with ``prompt`` and ``completion``.

    Attributes:
        path: The Python file, or the name of an installed module.
        function: Name of the function. If null, ``reward`` or ``compute_score``, or else the only public function.
        memory_mb: Memory that the function may allocate, in MiB.
    """

    kind: Literal["function"] = "function"
    path: Text
    function: Text | None = None
    memory_mb: Annotated[int, Field(ge=16, le=16_777_216)] = 4096


class ExactMatchReward(_Reward):
    """1 if the answer equals the reference, else 0.

    Attributes:
        column: The reference answer, or a list of accepted ones.
        normalize: Compare without case, punctuation, articles and extra spaces, as SQuAD does.
    """

    kind: Literal["exact_match"]
    column: Text = "answer"
    normalize: bool = True


class NumberReward(_Reward):
    """1 if a number in the answer equals the reference, else 0.

    Attributes:
        column: The reference: a number, or a text whose number follows ``####``.
        style: The number that counts: the ``last`` in the answer, but the one in its last LaTeX ``boxed`` if there is
            one; the first after the last ``####`` (``gsm8k``); or what verl's strict parser finds in the last 300
            characters and compares as text (``verl``).
        tolerance: Largest relative difference from the reference that counts as equal.
        format_score: Score of an answer that has a number, but a wrong one.
    """

    kind: Literal["number"]
    column: Text = "answer"
    style: Literal["last", "gsm8k", "verl"] = "last"
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.0
    format_score: Annotated[float, Field(ge=-1, le=1)] = 0.0


class ContainsReward(_Reward):
    """The share of the values in a column that the answer contains.

    Attributes:
        column: A text, or a list of texts.
        absent: Reward the share that the answer does not contain.
        ignore_case: Ignore case.
    """

    kind: Literal["contains"]
    column: Text = "answer"
    absent: bool = False
    ignore_case: bool = False


class FormatReward(_Reward):
    """1 if a regular expression matches the answer, else 0.

    Attributes:
        pattern: The regular expression, in Python's syntax; ``.`` matches line breaks.
        full: The expression must match the whole answer, not only a part of it.
    """

    kind: Literal["format"]
    pattern: Text
    full: bool = True


class LengthReward(_Reward):
    """1 if the number of tokens is in a range, else 0.

    Attributes:
        low: Fewest tokens.
        high: Most tokens.
    """

    kind: Literal["length"]
    low: _Tokens = 0
    high: _Tokens


class OverlongReward(_Reward):
    """0 up to ``max - buffer`` tokens, then linear to -1 at ``max`` tokens.

    Source: Yu et al. 2025, "DAPO" (arXiv 2503.14476), equation 13.

    Attributes:
        max: Number of tokens from which the reward is -1.
        buffer: Number of tokens over which it falls.
    """

    kind: Literal["overlong"]
    max: Annotated[int, Field(ge=1, le=16_777_216)]
    buffer: Annotated[int, Field(ge=1, le=16_777_216)]


class RepetitionReward(_Reward):
    """``-max_penalty`` times the share of the n-grams of tokens that repeat an earlier one.

    Source: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373), appendix C.2.

    Attributes:
        ngram: Tokens of an n-gram.
        max_penalty: Penalty if all n-grams were repetitions.
    """

    kind: Literal["repetition"]
    ngram: Annotated[int, Field(ge=1, le=1024)] = 4
    max_penalty: Positive = 1.0


class JudgeReward(_Reward):
    """The grade that another model gives, over an OpenAI-compatible ``/chat/completions``.

    Attributes:
        url: Address of the server, up to ``/v1``. No answer is sent to another address.
        model: Name of the model on the server.
        prompt: A text file with ``{prompt}``, ``{answer}`` and names of columns in braces; with ``{answer_1}`` and
            ``{answer_2}`` it compares two answers.
        scale: Lowest and highest grade; the reward is 0 to 1 between them.
        max_new_tokens: Longest answer of the judge.
        num_parallel: Requests at the same time.
        retries: How often a failed request is repeated.
        api_key_env: Name of the environment variable with the key.
    """

    kind: Literal["judge"]
    url: Text
    model: Text
    prompt: Text
    scale: Annotated[tuple[_Weight, _Weight], Strict(False)] = (1.0, 10.0)
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 512
    num_parallel: Annotated[int, Field(ge=1, le=1024)] = 8
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    api_key_env: Text | None = None
    time_limit_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0


class ModelReward(_Reward):
    """The score of a reward model that Ingle has trained.

    Attributes:
        path: The run folder of ``objective.kind: reward``.
    """

    kind: Literal["model"]
    path: Text


_RewardConfig = Annotated[
    FunctionReward
    | ExactMatchReward
    | NumberReward
    | ContainsReward
    | FormatReward
    | LengthReward
    | OverlongReward
    | RepetitionReward
    | JudgeReward
    | ModelReward,
    Field(discriminator="kind"),
]
RewardConfig = Annotated[_RewardConfig, tagged("kind", default="function", input_type=_RewardConfig)]

#: A list of rewards; a text is short for the ``path`` of a function.
Rewards = Annotated[
    tuple[RewardConfig, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(one_or_more("path"), json_schema_input_type=list[RewardConfig | Text] | RewardConfig | Text),
]
#: As :data:`Rewards`, but may be empty.
OptionalRewards = Annotated[
    tuple[RewardConfig, ...],
    Strict(False),
    BeforeValidator(one_or_more("path"), json_schema_input_type=list[RewardConfig | Text] | RewardConfig | Text),
]


def reward_names(rewards: tuple[RewardConfig, ...]) -> tuple[str, ...]:
    """Returns a name for each reward, without duplicates: its name, else its function or kind, then a number."""
    names: list[str] = []
    for reward in rewards:
        function = reward.function if isinstance(reward, FunctionReward) else None
        base = name = reward.name or function or reward.kind
        number = 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return tuple(names)
