"""``adapter:`` what is trained on top of the base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from ingle.config.section import Section, Strings, Text, tagged

Patterns = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]


class NoAdapter(Section):
    """Full fine-tuning: every weight of the model is trained."""

    kind: Literal["none"]


class LoraAdapter(Section):
    """Low-rank adaptation: ``y = x W^T + scale * dropout(x) A^T B^T``.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), equation 3.

    Attributes:
        rank: Rows of A, columns of B.
        alpha: ``scale = alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``). 2 * rank when null.
        dropout: Share of the adapter's inputs set to zero in training.
        rslora: Rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).
        lora_plus_ratio: Learning rate of B over that of A (Hayou et al. 2024, arXiv 2402.12354); 1 is plain LoRA.
        target_modules: ``all-linear``, or patterns matched against the end of a module's path
            (``q_proj``, ``layers.*.mlp.*``).
        trainable_modules: Modules trained whole and saved with the adapter (``embed_tokens``, ``lm_head``).
        path: An adapter folder in PEFT's layout to start from; its rank and targets must agree.
    """

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    target_modules: Literal["all-linear"] | Patterns = "all-linear"
    trainable_modules: Strings = ()
    path: Text | None = None

    @property
    def scale(self) -> float:
        """The factor in front of ``x A^T B^T``."""
        alpha = self.alpha if self.alpha is not None else 2.0 * self.rank
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank


_Adapter = Annotated[NoAdapter | LoraAdapter, Field(discriminator="kind")]
AdapterConfig = Annotated[_Adapter, tagged("kind", default="lora", input_type=_Adapter | Literal["none", "lora"])]
