"""Objectives: what a run optimizes. There is one file per family, and one training loop for all."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ingle import adapters
from ingle.config.objective import (
    FAMILY,
    Classify,
    Mlm,
    ObjectiveConfig,
    Seq2Seq,
    Span,
    reads_answers,
    rows_of,
    samples_answers,
)
from ingle.config.policy import Distill
from ingle.config.preferences import Bco, Cpo, Dpo, JudgedConfig, Kto, Orpo, Reward, Simpo
from ingle.config.presets import suit_preferences
from ingle.config.run import Run
from ingle.data import HeldOut, PromptSet, Sequences, SequenceSampler, TokenDataset
from ingle.data.corruption import Corruption, Infilling, Masking, SpanCorruption, find_sentinels, mask_token
from ingle.errors import ConfigError
from ingle.models import Model, kind_of, num_tokens, refuse_tokens_beyond, why_prompts_repeat
from ingle.objectives.answer import AnswerLoss
from ingle.objectives.classify import ClassLoss, ClassWeights, balanced_weights
from ingle.objectives.distill import DivergenceLoss
from ingle.objectives.driver import DocumentLoss, PackedObjective
from ingle.objectives.interface import Check, Measure, Objective, Relief, StepModule, Sums, Term
from ingle.objectives.judged import JudgedLoss, class_weights
from ingle.objectives.lm import NextTokenLoss, check_first_tokens
from ingle.objectives.mlm import MaskedTokenLoss
from ingle.objectives.pairs import PairLoss
from ingle.objectives.preferences import JudgedObjective, PreferenceObjective, Sharing
from ingle.objectives.reference_cache import open_cache
from ingle.objectives.reward import RewardLoss, start_scores
from ingle.objectives.reward_models import RewardModel
from ingle.objectives.rollouts.building import insert_roles, sampled_loss, sampled_objective
from ingle.objectives.router_loss import balanced, choose_routers
from ingle.objectives.seq2seq import Joining, TargetLoss, target_of
from ingle.objectives.tag import TagLoss
from ingle.parallel import Mesh

__all__ = [
    "AnswerLoss",
    "Check",
    "ClassLoss",
    "Context",
    "DocumentLoss",
    "MaskedTokenLoss",
    "Measure",
    "NextTokenLoss",
    "Objective",
    "PackedObjective",
    "PreferenceObjective",
    "Relief",
    "StepModule",
    "Sums",
    "TagLoss",
    "TargetLoss",
    "Term",
    "build",
    "corruption",
    "insert_roles",
    "make_corruption",
    "open_cache",
    "settle_sharing",
    "start_scores",
]

#: Points of the curve of the divergence from the reference, and the fewest steps between two of them.
_KL_POINTS, _KL_EVERY = 50, 20


@dataclass(frozen=True, slots=True)
class Context:
    """What objectives are built from.

    Attributes:
        model: The model; it may still be on the meta device.
        tokenizer: Its fast tokenizer.
        dataset: The tokenized documents.
        sequences: The documents of each packed row.
        global_batch_size: Sequences per step.
        micro_batch_size: Sequences per forward pass.
        mesh: The ranks that share a step, and the device of the batches.
        held_out: Documents for validation; None without.
        num_steps: Steps of the run.
        shards: Whether forward passes are collective, since ranks have parts of the weights.
        roles: What :func:`insert_roles` returned.
    """

    model: Model
    tokenizer: Any
    dataset: TokenDataset
    sequences: Sequences
    global_batch_size: int
    micro_batch_size: int
    mesh: Mesh
    held_out: HeldOut | None = None
    num_steps: int = 1
    shards: bool = False
    roles: Mapping[int, tuple[str, str | None]] = field(default_factory=dict)


def build(run: Run, context: Context) -> Objective:
    """Builds the objective that ``run.objective`` names.

    Raises:
        ConfigError: The tokenizer lacks a token that the objective needs, or an option does not fit the data.
        ModelError: The model does not say which token begins a target.
    """
    module = _loss(run, context)
    if samples_answers(rows_of(run.objective).kind):
        assert isinstance(context.dataset, PromptSet)
        return sampled_objective(
            run,
            module,
            prompts=context.dataset,
            sequences=context.sequences,
            tokenizer=context.tokenizer,
            initial=partial(adapters.use, context.model, "initial"),
            models={
                number: RewardModel(path, context.model, role, context.tokenizer, context.mesh)
                for number, (path, role) in context.roles.items()
            },
            held_out=context.held_out,
            num_steps=context.num_steps,
            global_batch_size=context.global_batch_size,
            micro_batch_size=context.micro_batch_size,
            shards=context.shards,
            mesh=context.mesh,
        )
    sampler = SequenceSampler(context.sequences, run.seed, run.data.shuffle)
    options: dict[str, Any] = {
        "corrupt": corruption(run, context),
        "documents_per_sample": 2 if reads_sources(run.objective, context.model) else 1,
        "global_batch_size": context.global_batch_size,
        "micro_batch_size": context.micro_batch_size,
        "mesh": context.mesh,
        "held_out": context.held_out,
    }
    initial = partial(adapters.use, context.model, "initial")
    match run.objective:
        case Dpo():
            beta = suit_preferences(run.objective).beta
            return PreferenceObjective(
                module,
                context.dataset,
                sampler,
                initial=initial,
                beta=beta,
                kl_steps=_kl_steps(run, context),
                **options,
            )
        case Kto() | Bco():
            return JudgedObjective(
                module,
                context.dataset,
                sampler,
                initial=initial,
                baseline=(baseline := _baseline(run.objective)),
                kl_steps=() if baseline == "mismatched" else _kl_steps(run, context),
                sequences=context.sequences,
                seed=run.seed,
                **options,
            )
    return PackedObjective(module, context.dataset, sampler, **options)


def reads_sources(objective: ObjectiveConfig, model: Model) -> bool:
    """Returns whether every text of a row is two documents: a source, and the target that a decoder predicts."""
    if objective.kind == "seq2seq":
        return True
    return FAMILY[objective.kind] in ("pairs", "judged") and kind_of(model.config) == "encoder_decoder"


def _kl_steps(run: Run, context: Context) -> Container[int]:
    """Returns the steps at which the divergence from the reference is measured; it costs two forward passes."""
    trains_head = any(each.requires_grad for each in context.model.get_output_embeddings().parameters())
    if run.adapter.kind == "none" or trains_head:  # then there is no reference, or it has another output layer
        return ()
    return {1, context.num_steps, *range(0, context.num_steps, max(_KL_EVERY, context.num_steps // _KL_POINTS))}


def _baseline(config: JudgedConfig) -> Literal["mismatched", "running", "none"]:
    if isinstance(config, Bco):
        return "running"
    return "none" if config.loss == "apo_zero" else config.baseline


def _loss(run: Run, context: Context) -> StepModule:
    model = context.model
    match run.objective:
        case Dpo() | Simpo() | Cpo() | Orpo():
            return balanced(PairLoss(model, run.objective), *choose_routers(run, model))
        case Kto() | Bco():
            weights = class_weights(run.objective, context.dataset.document_column("scores"))
            return balanced(JudgedLoss(model, run.objective, weights), *choose_routers(run, model))
        case Reward():
            return RewardLoss(model, run.objective)
        case Distill():
            return DivergenceLoss(model, run.objective, context.tokenizer)
    if samples_answers(run.objective.kind):
        return sampled_loss(run, model, context.mesh)
    match run.objective.kind:
        case "clm" | "sft":
            return balanced(NextTokenLoss(model), *choose_routers(run, model))
        case "mlm":
            return MaskedTokenLoss(model)
        case "span" | "seq2seq":
            return TargetLoss(model)
        case "tag":
            return TagLoss(model)
        case "answer":
            return AnswerLoss(model)
        case "classify":
            assert isinstance(run.objective, Classify)
            if run.objective.problem == "auto":
                raise ConfigError("The kind of labels is not known yet.", where="objective.problem")
            return ClassLoss(model, run.objective.problem, run.objective.label_smoothing)
    raise AssertionError(run.objective.kind)


def corruption(run: Run, context: Context) -> Corruption | None:
    """Returns what turns documents into what the model sees and predicts; None if they stay as they are.

    Raises:
        ConfigError: The tokenizer lacks a token that the objective needs.
        ModelError: The model does not say which token begins a target.
    """
    config = run.objective
    match config.kind:
        case "clm" | "sft" | "distill":
            return check_first_tokens
        case "classify" if config.class_weights != "none":
            return ClassWeights(_class_weights(config, context.dataset))
    if reads_answers(config.kind):
        return _answers(config, context.model)
    held_out = [] if context.held_out is None else [context.held_out.dataset]
    longest = max(int(dataset.lengths.max()) for dataset in (context.dataset, *held_out))
    return make_corruption(config, context.model, context.tokenizer, seed=run.seed, max_length=longest)


def _answers(config: ObjectiveConfig, model: Model) -> Corruption | None:
    """Returns what joins sources with their targets, and shares the prompts of rows; see :func:`settle_sharing`.

    Raises:
        ConfigError: Prompts are to be shared in a model that reads them together with their answers.
    """
    joining = Joining(target_of(model)) if reads_sources(config, model) else None
    if FAMILY[config.kind] == "judged":  # each answer is a row
        return joining
    can_share = joining is not None or kind_of(model.config) == "causal"
    shares = getattr(config, "share_prompts", False)
    if shares == "auto":
        shares = can_share
    if shares and not can_share:
        raise ConfigError(
            f"{type(model).__name__} reads each answer together with its prompt, which cannot be shared.",
            where="objective.share_prompts",
            fix="--objective.share_prompts=auto",
        )
    return Sharing(joining) if shares else joining


def settle_sharing(objective: Objective, config: ObjectiveConfig, model: Model) -> str | None:
    """Repeats prompts that a model, as its weights show, computes otherwise if they are shared.

    All ranks call it together, inside :func:`ingle.parallel.call_outside_step`.

    Returns:
        A sentence with the reason; None if prompts stay as they are.

    Raises:
        ConfigError: ``share_prompts`` is true, and the model does not share them.
    """
    sharing = objective.corrupt if isinstance(objective, PackedObjective) else None
    if not isinstance(sharing, Sharing) or (reason := why_prompts_repeat(model)) is None:
        return None
    message = f"Prompts are computed again for each answer: {reason}."
    if getattr(config, "share_prompts", "auto") is True:
        raise ConfigError(message, where="objective.share_prompts", fix="--objective.share_prompts=auto")
    sharing.is_on = False
    return message


def make_corruption(
    config: ObjectiveConfig, model: Model, tokenizer: Any, *, seed: int, max_length: int
) -> Corruption | None:
    """Returns what hides tokens, or joins sources with their targets; None if the objective does neither.

    Args:
        config: The objective.
        model: The model; it may still be on the meta device.
        tokenizer: Its fast tokenizer.
        seed: Decides, next to the places of documents, which tokens are hidden.
        max_length: Tokens of the longest document.

    Raises:
        ConfigError: The tokenizer lacks a token that the objective needs.
        ModelError: The model does not say which token begins a target.
    """
    vocab_size = min(num_tokens(model), tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True))
    match config:
        case Mlm():
            refuse_tokens_beyond(model, mask_token(tokenizer), tokenizer)
            return Masking(config, tokenizer, seed=seed, vocab_size=vocab_size)
        case Span(style="bart"):
            refuse_tokens_beyond(model, mask_token(tokenizer), tokenizer)
            return Infilling(config, tokenizer, target_of(model), seed=seed, vocab_size=vocab_size)
        case Span():
            refuse_tokens_beyond(model, int(find_sentinels(tokenizer, config.sentinels).max()), tokenizer)
            return SpanCorruption(config, tokenizer, target_of(model), seed=seed, max_length=max_length)
        case Seq2Seq():
            return Joining(target_of(model))
        case _:
            return None


def _class_weights(config: Classify, dataset: TokenDataset) -> npt.NDArray[np.float64]:
    if isinstance(config.class_weights, tuple):
        return np.array(config.class_weights)
    return balanced_weights(dataset.label_counts(len(config.labels or ())))
