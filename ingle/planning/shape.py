"""Shapes of model and data, as plain numbers: planning needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The linear layers of one shape.

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
        count: How many the model has.
        active: How many one token passes through (fewer than ``count`` for experts).
        adapted: How many have an adapter.
        bits_per_weight: Bits of one weight, if formats differ from module to module.
    """

    in_features: int
    out_features: int
    count: int
    active: int
    adapted: int
    bits_per_weight: float | None = None

    @property
    def num_weights(self) -> int:
        """Weights of one layer."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a model.

    Attributes:
        num_parameters: All parameters, tied ones once.
        linears: Linear layers inside the decoder layers.
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
    """Shape of tokenized data.

    Attributes:
        num_sequences: Rows after packing.
        num_tokens: Tokens in all documents.
        longest: Tokens of the longest sequence.
    """

    num_sequences: int
    num_tokens: int
    longest: int
