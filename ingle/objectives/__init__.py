"""Objectives: what a run optimizes. There is one file per family, and one training loop for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.config.objective import Classify, Span
from ingle.config.run import Run
from ingle.data import HeldOut, Sequences, SequenceSampler, TokenDataset
from ingle.data.corruption import Corruption, Infilling, Masking, SpanCorruption, find_sentinels, mask_token
from ingle.errors import ConfigError
from ingle.models import Model, num_tokens, refuse_tokens_beyond
from ingle.objectives.answer import AnswerLoss
from ingle.objectives.classify import ClassLoss, ClassWeights, balanced_weights
from ingle.objectives.driver import DocumentLoss, PackedObjective
from ingle.objectives.interface import Objective, StepModule, Sums, Term
from ingle.objectives.lm import NextTokenLoss, check_first_tokens
from ingle.objectives.mlm import MaskedTokenLoss
from ingle.objectives.router_loss import choose_routers
from ingle.objectives.seq2seq import Joining, TargetLoss, target_of
from ingle.objectives.tag import TagLoss
from ingle.parallel import Mesh

__all__ = [
    "AnswerLoss",
    "ClassLoss",
    "Context",
    "DocumentLoss",
    "MaskedTokenLoss",
    "NextTokenLoss",
    "Objective",
    "PackedObjective",
    "StepModule",
    "Sums",
    "TagLoss",
    "TargetLoss",
    "Term",
    "build",
    "corruption",
]


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
    """

    model: Model
    tokenizer: Any
    dataset: TokenDataset
    sequences: Sequences
    global_batch_size: int
    micro_batch_size: int
    mesh: Mesh
    held_out: HeldOut | None = None


def build(run: Run, context: Context) -> Objective:
    """Builds the objective that ``run.objective`` names.

    Raises:
        ConfigError: The tokenizer lacks a token that the objective needs, or an option does not fit the data.
        ModelError: The model does not say which token begins a target.
    """
    return PackedObjective(
        _loss(run, context.model),
        context.dataset,
        SequenceSampler(context.sequences, run.seed, run.data.shuffle),
        corrupt=corruption(run, context),
        documents_per_sample=2 if run.objective.kind == "seq2seq" else 1,
        global_batch_size=context.global_batch_size,
        micro_batch_size=context.micro_batch_size,
        mesh=context.mesh,
        held_out=context.held_out,
    )


def _loss(run: Run, model: Model) -> DocumentLoss:
    match run.objective.kind:
        case "clm" | "sft":
            return NextTokenLoss(model, *choose_routers(run, model))
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


def corruption(run: Run, context: Context) -> Corruption | None:
    """Returns what turns documents into what the model sees and predicts; None if they stay as they are.

    Raises:
        ConfigError: The tokenizer lacks a token that the objective needs.
    """
    model, tokenizer, config = context.model, context.tokenizer, run.objective
    vocab_size = min(num_tokens(model), tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True))
    match config.kind:
        case "clm" | "sft":
            return check_first_tokens
        case "mlm":
            refuse_tokens_beyond(model, mask_token(tokenizer), tokenizer)
            return Masking(config, tokenizer, seed=run.seed, vocab_size=vocab_size)
        case "span":
            return _span_corruption(config, context, run.seed, vocab_size)
        case "seq2seq":
            return Joining(target_of(model))
        case "classify" if config.class_weights != "none":
            return ClassWeights(_class_weights(config, context.dataset))
        case _:
            return None


def _span_corruption(config: Span, context: Context, seed: int, vocab_size: int) -> Corruption:
    target = target_of(context.model)
    inserted = (
        mask_token(context.tokenizer)
        if config.style == "bart"
        else find_sentinels(context.tokenizer, config.sentinels).max()
    )
    refuse_tokens_beyond(context.model, int(inserted), context.tokenizer)
    if config.style == "bart":
        return Infilling(config, context.tokenizer, target, seed=seed, vocab_size=vocab_size)
    refuse_tokens_beyond(
        context.model, int(find_sentinels(context.tokenizer, config.sentinels).max()), context.tokenizer
    )
    held_out = [] if context.held_out is None else [context.held_out.dataset]
    longest = max(int(dataset.lengths.max()) for dataset in (context.dataset, *held_out))
    return SpanCorruption(config, context.tokenizer, target, seed=seed, max_length=longest)


def _class_weights(config: Classify, dataset: TokenDataset) -> npt.NDArray[np.float64]:
    if isinstance(config.class_weights, tuple):
        return np.array(config.class_weights)
    return balanced_weights(dataset.label_counts(len(config.labels or ())))
