"""``optim:`` the optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.section import Count, Positive, Section, Seed, tagged

#: Peak learning rates by the family of the objective: with an adapter, and of all weights.
DEFAULT_LR: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("text", "corruption", "labels"), (2e-4, 2e-4)),
    **dict.fromkeys(("pairs", "judged"), (2e-5, 1e-6)),
    "reward": (1e-4, 1e-5),
    "prompts": (1e-5, 1e-6),
}

Fraction = Annotated[float, Field(ge=0, lt=1)]
ProjectionRank = Annotated[int, Field(ge=1, le=65_536)]


class AdamW(Section):
    """AdamW with a float32 master and two moments per weight (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"


class GaLore(Section):
    """AdamW whose moments are in a subspace of each matrix's gradient: its largest singular directions.

    It is for full fine-tuning. Embeddings, the head, vectors, and matrices of at most this rank keep plain AdamW.

    Source: Zhao et al. 2024, "GaLore" (arXiv 2403.03507), algorithm 2. As published, moments stay as they are
    when directions change.

    Attributes:
        rank: Directions of each matrix, along its smaller side.
        update_every: Steps after which the directions are computed again.
        scale: Factor of the update.
    """

    kind: Literal["galore"]
    rank: ProjectionRank = 128
    update_every: Count = 200
    scale: Positive = 0.25


class Apollo(Section):
    """SGD with learning rates per row or column that AdamW on a random projection of the gradient chooses.

    It is for full fine-tuning. Embeddings, the head, vectors, and matrices of at most this rank keep plain AdamW.

    Source: Zhu et al. 2024, "APOLLO" (arXiv 2412.05270), algorithm 1.

    Attributes:
        rank: Rows of the projection.
        update_every: Steps after which a new projection is drawn.
        scale: The update is multiplied by its square root.
        norm_growth: The norm of an update is at most that of the last one times this.
    """

    kind: Literal["apollo"]
    rank: ProjectionRank = 256
    update_every: Count = 200
    scale: Positive = 1.0
    norm_growth: Annotated[float, Field(gt=1, le=1e9)] = 1.01

    @property
    def by_channel(self) -> bool:
        """Whether each row or column has a learning rate of its own, instead of each matrix."""
        return True


class ApolloMini(Apollo):
    """APOLLO with one projected row and one learning rate per matrix: as little memory as SGD."""

    kind: Literal["apollo_mini"]  # type: ignore[assignment]
    rank: ProjectionRank = 1
    scale: Positive = 128.0

    @property
    def by_channel(self) -> bool:
        """Whether each row or column has a learning rate of its own, instead of each matrix."""
        return False


class Lisa(Section):
    """AdamW on a few layers at a time, which are drawn again and again; all else outside of the layers is trained.

    It is for full fine-tuning. Masters and moments exist for the drawn layers only. A layer that is no longer drawn
    keeps its weights in the dtype of the model, and its moments begin again when it is drawn next.

    Source: Pan et al. 2024, "LISA" (arXiv 2403.17919), algorithm 1.

    Attributes:
        active: Layers that are trained at a time.
        every: Steps after which layers are drawn again.
    """

    kind: Literal["lisa"]
    active: Count = 2
    every: Count = 20


class Subspace(Section):
    """AdamW on the coordinates of a random subspace through the initial weights: ``W = W0 + gain * P z``.

    What the adapter would train, or all weights without one, moves together in ``dim`` directions. This measures how
    many directions a task needs; ``ingle rank`` does it.

    Source: Aghajanyan et al. 2020, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning"
    (arXiv 2012.13255), section 3; Le et al. 2013, "Fastfood" (ICML).

    Attributes:
        dim: Number of directions: values of z, and one gain per tensor with ``gains``.
        gains: Train a factor for each tensor (SAID), instead of z alone (DID).
        projection: ``fastfood``: all of z moves each weight, along nearly orthogonal directions. ``index``: one value
            of z moves each weight, which keeps lengths exactly. ``auto``: index with an adapter, fastfood without.
        seed: Seed of the directions.
    """

    kind: Literal["subspace"]
    dim: Annotated[int, Field(ge=1, le=100_000_000)] = 256
    gains: bool = False
    projection: Literal["auto", "fastfood", "index"] = "auto"
    seed: Seed = 0


_Rule = Annotated[AdamW | GaLore | Apollo | ApolloMini | Lisa | Subspace, Field(discriminator="kind")]
_Kinds = Literal["adamw", "galore", "apollo", "apollo_mini", "lisa", "subspace"]
UpdateRule = Annotated[_Rule, tagged("kind", default="adamw", input_type=_Rule | _Kinds)]


class OptimConfig(Section):
    """The optimizer with warm-up and a learning-rate schedule.

    Attributes:
        rule: How gradients become updates. ``adamw`` by default; ``galore``, ``apollo``, ``apollo_mini`` and ``lisa``
            need less memory for full fine-tuning; ``subspace`` measures.
        lr: Peak learning rate. If null, it depends on the objective and on whether an adapter is trained: 2e-4 for
            supervised training (full fine-tuning needs about a tenth of it); with an adapter, 2e-5 for preferences,
            1e-4 for reward models and 1e-5 for sampled answers; without one, 1e-6, 1e-5 and 1e-6.
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay; not applied to biases, norms and embeddings.
        schedule: Shape of the learning rate after the warm-up.
        warmup_steps: Steps of linear warm-up. If null, ``warmup_ratio`` decides.
        warmup_ratio: Fraction of the run's steps used for warm-up. Ignored if ``warmup_steps`` is set.
        min_lr_ratio: Final learning rate of ``linear`` and ``cosine``, as a fraction of ``lr``.
        max_grad_norm: Scale down gradients whose norm is larger than this. If null, do not clip.
    """

    rule: UpdateRule = AdamW()
    lr: Annotated[float, Field(gt=0, le=1_000)] | None = None
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    warmup_ratio: Fraction = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Positive | None = 1.0
