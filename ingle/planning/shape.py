"""The shapes a plan is made from: plain numbers, so that planning needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Linear maps of one shape.

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
        count: How many of them the model holds.
        active: How many of them one token passes through (fewer than ``count`` for experts).
        adapted: How many of them get an adapter.
        bits_per_weight: What one of their weights takes, where formats differ from module to module.
    """

    in_features: int
    out_features: int
    count: int
    active: int
    adapted: int
    bits_per_weight: float | None = None

    @property
    def num_weights(self) -> int:
        """Weights of one of them."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as the planner sees it.

    Attributes:
        num_parameters: All parameters, tied ones once.
        linears: The linear maps inside the decoder layers.
        other_parameters: Embeddings, head, norms and biases.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the output head.
        saved_parameters: Parameters trained in full in addition to an adapter (embeddings, the head).
    """

    num_parameters: int
    linears: tuple[LinearShape, ...]
    other_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    saved_parameters: int


@dataclass(frozen=True, slots=True)
class DataShape:
    """Tokenized data as the planner sees it.

    Attributes:
        num_sequences: Rows after packing.
        num_tokens: Tokens in all documents.
        longest: Tokens of the longest sequence.
    """

    num_sequences: int
    num_tokens: int
    longest: int
