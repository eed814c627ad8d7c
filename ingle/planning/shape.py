"""Shapes of model and data, as plain numbers: planning needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

#: How a layer mixes tokens: all of them, a window, both sides (encoders), or by a state that is passed along.
Mixer = Literal["full_attention", "sliding_attention", "bidirectional_attention", "recurrent"]


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The linear layers of one name in a decoder layer, or of one shape in a model.

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
        count: How many there are: in one layer, or in the model for :attr:`ModelShape.linears`.
        active: How many one token passes through (fewer than ``count`` for experts).
        adapted: How many have an adapter.
        bits_per_weight: Bits of one weight, if formats differ from module to module.
        name: Path within the layer (``self_attn.q_proj``).
        bias: Whether it has a bias; its parameters are among the ``other_parameters``.
    """

    in_features: int
    out_features: int
    count: int = 1
    active: int = 1
    adapted: int = 0
    bits_per_weight: float | None = None
    name: str = ""
    bias: bool = False

    @property
    def num_weights(self) -> int:
        """Weights of one layer."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Decoder or encoder layers of one kind.

    Attributes:
        linears: Linear layers of one such layer, in its order.
        count: How many layers of this kind the model has.
        other_parameters: Norms, biases, routers, convolutions and embeddings of one layer.
        mixer: How its tokens interact.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Features of a head.
        window: Tokens of a sliding window; 0 without one.
        num_norms: Norms over the hidden state.
        head_norms: Whether queries and keys are normalized.
        norm: Kind of norm.
        activation: Name of the activation in the feed-forward part, as ``config.json`` names it.
        gated: Whether the feed-forward part multiplies with a gate (SwiGLU, GeGLU).
        num_experts: Experts; 0 without.
        experts_per_token: Experts that a token passes through.
        part: ``decoder`` (also of decoder-only models) or ``encoder``.
        cross_attention: Whether it attends to the output of an encoder.
        uses: How often a token passes each of them: more than once if an architecture repeats its layers (ALBERT).
    """

    linears: tuple[LinearShape, ...]
    count: int = 1
    other_parameters: int = 0
    mixer: Mixer = "full_attention"
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 0
    window: int = 0
    num_norms: int = 2
    head_norms: bool = False
    norm: Literal["rms", "layer"] = "rms"
    activation: str = "silu"
    gated: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    part: Literal["decoder", "encoder"] = "decoder"
    cross_attention: bool = False
    uses: int = 1

    @property
    def num_parameters(self) -> int:
        """Parameters of one layer."""
        return self.other_parameters + sum(lin.num_weights * lin.count for lin in self.linears)


@dataclass(frozen=True, slots=True)
class Companion:
    """Another model that runs next to the one that is trained, without gradients: a teacher, or a reward model.

    Attributes:
        weight_bytes: Its weights.
        hidden_size: Width of the hidden states that a step keeps of it; 0 if it keeps none.
        active_parameters: Weights that a token of a step is multiplied with; 0 if no step computes it.
    """

    weight_bytes: int
    hidden_size: int = 0
    active_parameters: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Shape of a model.

    Attributes:
        layers: Its layers by kind.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the output head.
        embedding_parameters: Embeddings of tokens, positions and token types.
        head_parameters: Weights of the output head that it does not share with the embedding.
        final_parameters: Everything else outside of the layers: the last norm, projections, biases.
        outer_linears: Linear layers outside of the layers, except the output head, which may be quantized and adapted.
        saved_parameters: Parameters trained in full in addition to an adapter (embeddings, the head).
        adapter_parameters: Trained parameters of the adapter; None for low-rank ones, which follow from the rank.
        tied: Whether the head shares the weights of the embedding.
        model_type: As in ``config.json``.
        kind: What the model is.
        positions: How it encodes positions.
        max_positions: Longest text that it supports; 0 if unknown.
        fused: Whether Ingle has fused layers for its architecture; they run on a CPU over a frozen base.
        end_bits_per_weight: Bits of a weight of embedding and head, if they are quantized (GGUF files).
        companions: Other models that run next to it.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    embedding_parameters: int = 0
    head_parameters: int = 0
    final_parameters: int = 0
    outer_linears: tuple[LinearShape, ...] = ()
    saved_parameters: int = 0
    adapter_parameters: int | None = None
    tied: bool = False
    model_type: str = ""
    kind: Literal["causal", "encoder", "encoder_decoder"] = "causal"
    positions: Literal["rotary", "learned", "relative", "none"] = "rotary"
    max_positions: int = 0
    fused: bool = False
    end_bits_per_weight: float | None = None
    companions: tuple[Companion, ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers of all kinds."""
        return sum(layer.count for layer in self.layers)

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """All linear layers except the output head, counted over the model."""
        return tuple(self._each_linear())

    @cached_property
    def other_parameters(self) -> int:
        """Embeddings, head, norms and biases: what ``base.format`` does not quantize."""
        ends = self.embedding_parameters + self.head_parameters + self.final_parameters
        return ends + sum(layer.other_parameters * layer.count for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.other_parameters + sum(lin.num_weights * lin.count for lin in self.linears)

    @property
    def active_parameters(self) -> int:
        """Weights that a token is multiplied with: linear layers, with the chosen experts, and the head."""
        return sum(lin.num_weights * lin.active for lin in self.linears) + self.hidden_size * self.vocab_size

    def _each_linear(self) -> Iterator[LinearShape]:
        for layer in self.layers:
            for lin in layer.linears:
                yield replace(
                    lin,
                    count=lin.count * layer.count,
                    active=lin.active * layer.count * layer.uses,
                    adapted=lin.adapted * layer.count,
                )
        yield from self.outer_linears


@dataclass(frozen=True, slots=True)
class DataShape:
    """Shape of tokenized data. Tokens that a step computes once for several documents count once.

    Attributes:
        num_sequences: Rows after packing.
        num_tokens: Tokens in all documents.
        longest: Tokens of the longest sequence, if it is alone.
        longest_document: Tokens of the longest document; attention never crosses documents. 0 if unknown.
        mean_document: Tokens of a document on average; 0 if unknown.
        validation_tokens: Tokens of all held-out documents, which are not among ``num_tokens``.
        shared_prompt: Tokens of the longest sequence that it shares with those next to it.
        sequences_per_prompt: Sequences that share them.
    """

    num_sequences: int
    num_tokens: int
    longest: int
    longest_document: int = 0
    mean_document: float = 0.0
    validation_tokens: int = 0
    shared_prompt: int = 0
    sequences_per_prompt: int = 1

    def most_tokens(self, num_sequences: int) -> int:
        """Returns the most tokens of so many adjacent sequences."""
        prompts = math.ceil(num_sequences / self.sequences_per_prompt)
        return num_sequences * (self.longest - self.shared_prompt) + prompts * self.shared_prompt
