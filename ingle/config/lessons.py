"""What others have learned from experiments, as checks of a config: notes at the start of a run, with the evidence.

They forbid nothing. ``train.lessons: false`` turns them off. They are about models of the sizes that were studied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ingle.config.adapter import LowRankAdapter
from ingle.config.run import Run

#: Parameters from which a model is of a size for which learning rates were studied.
_STUDIED = 100_000_000
#: Adapters whose change has a scale.
_SCALED = ("lora", "dora")
#: Names of layers of attention.
_ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value", "query_key_value"),
    *("qkv", "Wqkv", "attn", "c_attn", "attention"),
)
#: Objectives that learn from answers that they sample.
_SAMPLING = ("ppo", "grpo", "rloo", "reinforce", "online_dpo")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a run before its first step.

    Attributes:
        run: The config.
        lr: Its peak learning rate.
        epochs: Passes over the data.
        parameters: Parameters of the model.
        trained: Trained parameters.
        tokens: Tokens of the data.
    """

    run: Run
    lr: float
    epochs: float
    parameters: int
    trained: int
    tokens: int

    @property
    def is_studied(self) -> bool:
        """Whether a pretrained model of a studied size is trained."""
        return self.parameters >= _STUDIED and self.run.model.init == "pretrained"

    @property
    def is_instruction(self) -> bool:
        """Whether answers are learned: the objectives for which many epochs were found to harm."""
        return self.run.objective.kind in ("sft", "dpo", "ipo", "simpo", "orpo", "cpo", "kto")


class Lesson(NamedTuple):
    """One lesson.

    Attributes:
        name: Name in tests.
        applies: Whether a run acts against it.
        message: What it says about the run, with the evidence.
        where: The options it concerns.
    """

    name: str
    applies: Callable[[Facts], bool]
    message: Callable[[Facts], str]
    where: str


class Note(NamedTuple):
    """What a lesson says about a run, and the options that it concerns."""

    text: str
    where: str


def find_lessons(facts: Facts) -> list[Note]:
    """Returns what the lessons say that a run acts against; nothing if they are turned off."""
    if not facts.run.train.lessons:
        return []
    return [Note(lesson.message(facts), lesson.where) for lesson in LESSONS if lesson.applies(facts)]


def _alpha(facts: Facts) -> float | None:
    """Returns the alpha that the config names for a scale of alpha / rank."""
    adapter = facts.run.adapter
    if not isinstance(adapter, LowRankAdapter) or adapter.kind not in _SCALED or adapter.rslora:
        return None
    return adapter.alpha


def _rank(facts: Facts) -> int:
    return facts.run.adapter.rank if isinstance(facts.run.adapter, LowRankAdapter) else 0


def _only_attention(facts: Facts) -> bool:
    adapter = facts.run.adapter
    targets = adapter.target_modules if isinstance(adapter, LowRankAdapter) else ()
    if isinstance(targets, str) or not targets:
        return False
    return all(
        target.rpartition(".")[2] in _ATTENTION or ".attn." in target or "self_attn" in target for target in targets
    )


def _grows_with_rank(facts: Facts) -> bool:
    adapter = facts.run.adapter
    return isinstance(adapter, LowRankAdapter) and adapter.rslora and adapter.alpha is None and adapter.rank > 16


LESSONS: tuple[Lesson, ...] = (
    Lesson(
        "epochs",
        lambda facts: (
            facts.is_instruction
            and facts.epochs > 3
            and not (facts.run.data.validation is not None and facts.run.train.keep_best)
        ),
        lambda facts: (
            f"{facts.epochs:.3g} epochs on answers: models begin to repeat them, and the loss on other answers rises "
            "after the first epochs (Ouyang et al. 2022, section 3.5: after one). With data.validation and "
            "train.keep_best, the best step is kept."
        ),
        "train.num_epochs",
    ),
    Lesson(
        "alpha",
        lambda facts: _alpha(facts) is not None and _alpha(facts) != 2 * _rank(facts),
        lambda facts: (
            f"alpha = {_alpha(facts):g} scales the change by {(_alpha(facts) or 0) / _rank(facts):.3g}, and usual "
            f"learning rates are tuned for 2: alpha = {2 * _rank(facts)}, twice the rank. A scale acts like a "
            "learning rate."
        ),
        "adapter.alpha",
    ),
    Lesson(
        "targets",
        _only_attention,
        lambda facts: (
            "Only attention is adapted. At equal parameters, all linear layers are better, and the feed-forward "
            'layers alone too (Schulman et al. 2025, "LoRA Without Regret": rank 256 on attention is behind rank 128 '
            "on them)."
        ),
        "adapter.target_modules",
    ),
    Lesson(
        "rate-of-full-fine-tuning",
        lambda facts: facts.is_studied and facts.run.adapter.kind == "none" and facts.lr > 5e-5,
        lambda facts: (
            f"A learning rate of {facts.lr:g} is that of an adapter: full fine-tuning wants about a tenth of it, 1e-5 "
            'to 5e-5 ("LoRA Without Regret").'
        ),
        "optim.lr",
    ),
    Lesson(
        "rate-of-lora",
        lambda facts: (
            facts.is_studied
            and facts.run.adapter.kind in _SCALED
            and facts.run.objective.kind == "sft"
            and facts.lr < 5e-5
        ),
        lambda facts: (
            f"A learning rate of {facts.lr:g} is that of full fine-tuning: LoRA wants about ten times as much, at any "
            'rank ("LoRA Without Regret").'
        ),
        "optim.lr",
    ),
    Lesson(
        "rate-of-virtual-tokens",
        lambda facts: facts.run.adapter.kind in ("prefix", "prompt") and facts.lr < 1e-3,
        lambda facts: (
            f"A learning rate of {facts.lr:g} hardly moves virtual tokens: 1e-2 to 0.3 is usual (Lester et al. 2021 "
            "use 0.3)."
        ),
        "optim.lr",
    ),
    Lesson(
        "rate-against-rank",
        _grows_with_rank,
        lambda facts: (
            f"With rslora and alpha = 2 * rank, the scale grows with the rank: {2 * _rank(facts) ** 0.5:.3g} at rank "
            f"{_rank(facts)}. Name a fixed alpha (16 in the paper's experiments), or lower the learning rate. Without "
            "rslora, the best rate does not depend on the rank."
        ),
        "adapter.rslora, adapter.alpha",
    ),
    Lesson(
        "capacity",
        lambda facts: _rank(facts) > 0 and facts.tokens * min(1.0, facts.epochs) > 100 * facts.trained,
        lambda facts: (
            f"{facts.trained:,} trained parameters for {facts.tokens:,} tokens: LoRA learns less than full "
            'fine-tuning once the data exceeds its capacity, at about 2 bits per parameter ("LoRA Without Regret"). '
            "A larger rank costs little; `ingle rank` measures it."
        ),
        "adapter.rank",
    ),
    Lesson(
        "forgetting",
        lambda facts: (
            facts.is_studied and facts.run.adapter.kind == "none" and facts.is_instruction and facts.epochs > 1
        ),
        lambda facts: (
            f"{facts.epochs:.3g} epochs of full fine-tuning forget more of what the model could do than LoRA does "
            '(Biderman et al. 2024, "LoRA Learns Less and Forgets Less"). Compare both models on a general task: '
            "`ingle evaluate RUN --task FILE`."
        ),
        "adapter.kind, train.num_epochs",
    ),
    Lesson(
        "dora",
        lambda facts: facts.run.adapter.kind == "dora",
        lambda facts: (
            "DoRA takes more time than LoRA and is not always better: 46.9 against 47.8 of LoRA, both of rank 32, in "
            "PEFT's comparison on GSM8K. `--adapter.kind=lora` shows it for your task."
        ),
        "adapter.kind",
    ),
    Lesson(
        "rank-of-rewards",
        lambda facts: facts.run.objective.kind in _SAMPLING and _rank(facts) > 64,
        lambda facts: (
            f"Rank {_rank(facts)} for rewards: they tell few bits per answer, and ranks from 1 to 32 do as well as "
            'full fine-tuning ("LoRA Without Regret"). A smaller rank saves memory and time.'
        ),
        "adapter.rank",
    ),
)
