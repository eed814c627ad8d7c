"""``objective:`` the training objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.policy import Distill, Grpo, OnlineDpo, Ppo, Raft, Reinforce, Rloo
from ingle.config.preferences import Bco, Cpo, Dpo, Kto, Orpo, Reward, Simpo
from ingle.config.section import Positive, Section, Text, tagged

ObjectiveKind = Literal[
    "clm",
    "sft",
    "mlm",
    "span",
    "seq2seq",
    "classify",
    "tag",
    "answer",
    "reward",
    "dpo",
    "kto",
    "orpo",
    "simpo",
    "cpo",
    "bco",
    "ppo",
    "grpo",
    "rloo",
    "reinforce",
    "online_dpo",
    "raft",
    "distill",
]

#: A share of something: 0 to 1.
_Share = Annotated[float, Field(ge=0, le=1)]
#: A share above 0 and below 1.
_Part = Annotated[float, Field(gt=0, lt=1)]


class Clm(Section):
    """Causal language modelling: the loss covers every token."""

    kind: Literal["clm"]


class Sft(Section):
    """Supervised fine-tuning: the loss covers only the answers."""

    kind: Literal["sft"] = "sft"


class Mlm(Section):
    """Masked language modelling for encoders: predict hidden tokens from both sides. Each epoch hides others.

    Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 3.1; Liu et al. 2019, "RoBERTa" (arXiv 1907.11692),
    section 4.1.

    Attributes:
        rate: Share of the tokens to predict; special tokens are never among them.
        replace: Share of the chosen tokens that become the mask token.
        random: Share of the chosen tokens that become a random token. The rest stays as it is.
        whole_words: Choose whole words instead of single tokens.
    """

    kind: Literal["mlm"]
    rate: _Part = 0.15
    replace: _Share = 0.8
    random: _Share = 0.1
    whole_words: bool = False


class Span(Section):
    """Denoising for encoder-decoders: restore text from which spans were removed.

    Source: Raffel et al. 2020, "T5" (arXiv 1910.10683), section 3.1.4; Tay et al. 2022, "UL2" (arXiv 2205.05131),
    section 3.1; Lewis et al. 2020, "BART" (arXiv 1910.13461), section 2.2.

    Attributes:
        style: ``t5`` replaces spans by sentinels and predicts the spans. ``ul2`` draws one of seven denoisers for each
            document. ``bart`` replaces spans by one mask token each, permutes the sentences and predicts the whole
            text.
        density: Share of the tokens to remove (``t5``).
        mean_length: Mean length of a span in tokens (``t5``).
        sentinels: Names of the sentinels, with ``{}`` for their number from 0 (``t5`` and ``ul2``).
        mode_tokens: Tokens that begin the source, by the mode of the denoiser: ``R``, ``X`` and ``S`` (``ul2``).
            Without them, the source has none.
        rate: Share of the words to remove (``bart``).
        poisson: Mean length of a span in words; lengths follow a Poisson distribution (``bart``).
        random: Share of the masks that become a random token (``bart``).
        permute_sentences: Permute the sentences of a document (``bart``).
    """

    kind: Literal["span"]
    style: Literal["t5", "ul2", "bart"] = "t5"
    density: _Part = 0.15
    mean_length: Annotated[float, Field(ge=1, le=1e6)] = 3.0
    sentinels: Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")] = "<extra_id_{}>"
    mode_tokens: dict[str, str] = Field(default_factory=dict)
    rate: _Part = 0.3
    poisson: Annotated[float, Field(gt=0, le=1000)] = 3.5
    random: _Share = 0.1
    permute_sentences: bool = True


class Seq2Seq(Section):
    """Training of encoder-decoders on pairs of a source and a target.

    Attributes:
        prefix: Text before every source, such as ``"summarize: "``.
    """

    kind: Literal["seq2seq"]
    prefix: str = ""


class Classify(Section):
    """Classification or regression of a text or a pair of texts, by a new head on any kind of model.

    Attributes:
        labels: The names of the classes, in the order of the head's outputs. If null, those in the training data.
        problem: ``single`` chooses one class, ``multi`` any number of classes, ``regression`` predicts a number.
            ``auto`` decides by the labels in the training data.
        class_weights: Weights of the classes in the loss: ``balanced`` weights each class by the inverse of its
            frequency; a list has one weight for each of ``labels``.
        label_smoothing: Share of the probability that the target gives to all classes alike (``single``).
    """

    kind: Literal["classify"]
    labels: Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] | None = None
    problem: Literal["auto", "single", "multi", "regression"] = "auto"
    class_weights: Literal["none", "balanced"] | Annotated[tuple[Positive, ...], Strict(False)] = "none"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


#: The prefixes of tags in each scheme; ``O`` is the tag of words outside.
SCHEMES: Mapping[str, str] = {
    "iob1": "BI",
    "iob2": "BI",
    "ioe1": "IE",
    "ioe2": "IE",
    "iobes": "BIES",
    "bilou": "BILU",
}


def outside_scheme(tag: str, scheme: str) -> bool:
    """Returns whether a tag cannot occur in a scheme; none of :data:`SCHEMES` allows every tag."""
    prefix, dash, kind = tag.partition("-")
    return scheme in SCHEMES and tag != "O" and not (dash and kind and prefix and prefix in SCHEMES[scheme])


class Tag(Section):
    """Token classification: one tag per word, read from its first token.

    Attributes:
        labels: The tags, in the order of the head's outputs. If null, those in the training data.
        scheme: How tags mark entities. ``auto`` reads them as conlleval does, which accepts every scheme; a scheme
            refuses tags that it does not have.
        stride: Tokens that two windows of a long text share.
    """

    kind: Literal["tag"]
    labels: Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] | None = None
    scheme: Literal["auto", "iob1", "iob2", "ioe1", "ioe2", "iobes", "bilou"] = "auto"
    stride: Annotated[int, Field(ge=0, le=1_048_576)] = 128


class Answer(Section):
    """Extractive question answering: find the span of a context that answers a question.

    Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 4.2.

    Attributes:
        stride: Tokens of the context that two windows share.
        max_answer_tokens: Longest answer in tokens.
        no_answer: Whether the model may answer that the context contains no answer. ``auto`` allows it if the training
            data has such questions.
    """

    kind: Literal["answer"]
    stride: Annotated[int, Field(ge=0, le=1_048_576)] = 128
    max_answer_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 30
    no_answer: Literal["auto", "allow", "forbid"] = "auto"


_Objective = Annotated[
    Clm
    | Sft
    | Mlm
    | Span
    | Seq2Seq
    | Classify
    | Tag
    | Answer
    | Reward
    | Dpo
    | Kto
    | Orpo
    | Simpo
    | Cpo
    | Bco
    | Ppo
    | Grpo
    | Rloo
    | Reinforce
    | OnlineDpo
    | Raft
    | Distill,
    Field(discriminator="kind"),
]
ObjectiveConfig = Annotated[_Objective, tagged("kind", default="sft", input_type=_Objective | ObjectiveKind)]

#: The model kinds that each objective trains.
TRAINS: Mapping[ObjectiveKind, tuple[str, ...]] = {
    "clm": ("causal",),
    "sft": ("causal",),
    "mlm": ("encoder",),
    "span": ("encoder_decoder",),
    "seq2seq": ("encoder_decoder",),
    "classify": ("encoder", "causal", "encoder_decoder"),
    "tag": ("encoder", "causal", "encoder_decoder"),
    "answer": ("encoder", "causal", "encoder_decoder"),
    "reward": ("encoder", "causal", "encoder_decoder"),
    "dpo": ("causal", "encoder_decoder"),
    "kto": ("causal", "encoder_decoder"),
    "orpo": ("causal", "encoder_decoder"),
    "simpo": ("causal", "encoder_decoder"),
    "cpo": ("causal", "encoder_decoder"),
    "bco": ("causal", "encoder_decoder"),
    **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "online_dpo", "raft", "distill"), ("causal",)),
}

#: What the rows of an objective are: texts or conversations, texts of which a part is hidden, texts with labels,
#: answers to compare, answers that are good or bad, answers to compare for a model that scores, or prompts that the
#: model itself answers.
Family = Literal["text", "corruption", "labels", "pairs", "judged", "reward", "prompts"]
FAMILY: Mapping[ObjectiveKind, Family] = {
    "clm": "text",
    "sft": "text",
    "mlm": "corruption",
    "span": "corruption",
    "seq2seq": "text",
    "classify": "labels",
    "tag": "labels",
    "answer": "labels",
    "reward": "reward",
    "dpo": "pairs",
    "kto": "judged",
    "orpo": "pairs",
    "simpo": "pairs",
    "cpo": "pairs",
    "bco": "judged",
    **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "online_dpo", "raft", "distill"), "prompts"),
}


def reads_answers(kind: ObjectiveKind) -> bool:
    """Returns whether an objective learns from preferences between answers or judgements of them."""
    return FAMILY[kind] in ("pairs", "judged", "reward")


def rows_of(objective: ObjectiveConfig) -> ObjectiveConfig:
    """Returns the objective as which the rows of a run are read: ``sft`` for distillation without sampled answers."""
    return Sft() if isinstance(objective, Distill) and not objective.on_policy_share else objective


def samples_answers(kind: ObjectiveKind) -> bool:
    """Returns whether an objective learns from answers that the model itself samples."""
    return FAMILY[kind] == "prompts"
