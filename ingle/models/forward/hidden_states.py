"""The two halves of a language model: the decoder up to its last norm, and the output head.

The loss never materializes all logits, so it needs the head's weight rather than its module. Architectures scale,
divide or cap their logits in ways that are read from the config. :func:`ingle.models.verify` compares the two halves
with the full model, so that an unknown way is detected.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.kernels.attention.bounds import make_bounds
from ingle.kernels.attention.cached import KeyStore, keep_in
from ingle.kernels.attention.trees import Trees
from ingle.kernels.layers.logits import LogitTransform
from ingle.models.forward.continued import Steps, places
from ingle.models.forward.documents import Documents
from ingle.models.forward.encoder_decoder import Row, forward_pairs
from ingle.models.forward.layout import Layout, boundaries_of, layout_of, padding_of
from ingle.models.forward.rotary_by_length import unchanged_length
from ingle.models.forward.to_head import run_to_head
from ingle.models.forward.virtual_tokens import insert_ids, num_added_keys, virtual_length
from ingle.models.kinds import kind_of
from ingle.models.text_part import padding_id, text_config
from ingle.parallel import call_inside, compute_device, is_sharded, is_unit
from ingle.planning.layouts import PADDING
from ingle.quant import QuantEmbedding, QuantLinear
from ingle.quant.task_heads import task_heads

if TYPE_CHECKING:
    from ingle.data.batch import Batch

Result = TypeVar("Result")

#: Settings that multiply or divide the logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
#: Multimodal models that do not apply the settings of their text model.
_UNSCALED = frozenset({"aya_vision", "cohere2_vision", "granite_speech", "granite_speech_plus"})
#: Names of the bound on logits in configs.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: ``cap(logit_scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        logit_scale: Factor on the logits.
        softcap: ``softcap * tanh(logits / softcap)`` if set.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Applies the head to ``[..., H]``; returns ``[..., V]``."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head(model: PreTrainedModel) -> Head:
    """Returns the output head of a model. Every call dequantizes a quantized head, so reuse the result.

    Raises:
        ModelError: The head is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear | QuantLinear):
        raise ModelError(
            f"The output head is a {type(layer).__name__}, not a linear layer.",
            where="model.id",
            fix="remove lm_head from adapter.target_modules; adapter.trainable_modules trains it in full",
        )
    transform = logit_transform(model)
    weight = layer.decode(computed_in(model)) if isinstance(layer, QuantLinear) else layer.weight
    bias = layer.bias
    if added := layout_of(model).added_bias:
        more = model.get_parameter_or_buffer(added).flatten()
        bias = more if bias is None else bias + more
    return Head(weight, bias, transform.scale, transform.softcap)


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Returns what an architecture does with its raw logits, from its config."""
    scaled = model.config.model_type not in _UNSCALED
    config = text_config(model.config) if scaled else None
    config = getattr(config, "decoder", config)  # of an encoder-decoder with a section for each part
    scale = 1.0
    for name in _FACTORS:
        scale *= float(getattr(config, name, None) or 1.0)
    for name in _DIVISORS:
        scale /= float(getattr(config, name, None) or 1.0)
    softcap = next((found for key in _SOFTCAPS if (found := getattr(config, key, None)) is not None), None)
    return LogitTransform(scale, None if softcap is None else float(softcap))


def through_head(model: PreTrainedModel, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns ``function(head, *inputs)``; the weights of a sharded head are gathered for it.

    Args:
        model: The model.
        function: Uses the :class:`Head` in this call only.
        inputs: Tensors that gradients pass through, such as the hidden states.

    Raises:
        ModelError: The head is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if not is_unit(layer) and any(is_sharded(parameter) for parameter in layer.parameters()):
        raise ModelError(
            f"The output layer of {type(model).__name__} cannot be sharded.",
            where="parallel.kind",
            why="the module around it has the bias",
            fix="--parallel.kind=ddp",
        )
    inside = partial(call_inside, layer, lambda *values: function(head(model), *values))
    # A bias that is added after the output layer lies in the module around it.
    owner = layout_of(model).added_bias.rpartition(".")[0]
    return call_inside(model.get_submodule(owner), inside, *inputs) if owner else inside(*inputs)


def device_of(model: PreTrainedModel) -> torch.device:
    """Returns the device of the output head, where batches go; unlike :func:`head`, dequantizes nothing."""
    heads = task_heads(model)
    layer: nn.Module = model.get_submodule(heads[0]) if heads else model.get_output_embeddings()
    return compute_device(next(layer.parameters()))


def computed_in(model: PreTrainedModel) -> torch.dtype:
    """Returns the dtype of the hidden states.

    transformers reports the dtype of the first floating parameter, which is not the embedding's if that is quantized,
    and float32 for a sharded parameter that is trained in bfloat16.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, QuantEmbedding):
        return embedding.weight_dtype
    built_in = model.config.dtype
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    return built_in if sharded and isinstance(built_in, torch.dtype) else model.dtype


def forward_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the input of the output layer, ``[1, N, H]``; no token attends to another document.

    Args:
        model: A model from :func:`ingle.models.meta_model`, with weights.
        batch: Documents packed in a single row. Of an encoder-decoder, the decoder's row is computed. In trees, a
            prompt is computed once for its answers, where the layout allows it.
    """
    parents = batch.parents()
    if "decoder_input_ids" in batch.columns:
        names = ("input_ids", "position_ids", "cu_seqlens")
        source, target = (Row(*(batch.columns[row + name] for name in names)) for row in ("", "decoder_"))
        return forward_pairs(model, source, target, parents)
    types = batch.columns.get("token_type_ids")
    bounds = batch.cu_seqlens
    if layout_of(model).kind in ("rows", "equal_rows"):
        bounds = bounds[: max(1, batch.num_documents) + 1]  # not the added document, which may be too short for a model
    trees = None if parents is None else Trees.of(bounds.tolist(), parents[: len(bounds) - 1])
    return forward_packed(model, batch.input_ids, batch.position_ids, bounds, types, trees)


def forward_packed(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None = None,
    trees: Trees | None = None,
) -> Tensor:
    """Computes :func:`forward_hidden` from ids, positions and types ``[1, N]`` and boundaries ``[D + 1]``.

    In layouts of rows, the result is zero for tokens after the last boundary. Virtual tokens of an adapter come before
    every document, and are left out of the result.
    """
    fills = layout_of(model).kind in ("packed", "documents")
    extended = insert_ids(model, input_ids, position_ids, cu_seqlens, token_type_ids, trees, fills=fills)
    if extended is None:
        return _forward_packed(model, input_ids, position_ids, cu_seqlens, token_type_ids, trees)
    ids, positions, bounds, types, extended_trees, place_N = extended
    return _forward_packed(model, ids, positions, bounds, types, extended_trees).index_select(1, place_N)


def _forward_packed(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None = None,
    trees: Trees | None = None,
) -> Tensor:
    layout = layout_of(model)
    if trees is not None and not shares_prompts(model, trees):
        return _forward_paths(model, input_ids, position_ids, token_type_ids, trees)
    if layout.kind in ("rows", "equal_rows"):
        if token_type_ids is None and layout.passes_types:
            token_type_ids = torch.zeros_like(input_ids)
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return _forward_rows(model, layout, {"input_ids": input_ids, **types}, cu_seqlens)
    return call_packed(model, input_ids, position_ids, cu_seqlens, run_to_head, token_type_ids, trees)


def shares_prompts(model: PreTrainedModel, trees: Trees) -> bool:
    """Returns whether a model computes the prompts of trees once.

    A prompt that sees its answers has other states for each of them. So it has if rotary factors depend on the length
    of the text, and an answer is too long.
    """
    is_causal = kind_of(model.config) == "causal"
    return (
        is_causal
        and layout_of(model).computes_trees
        and trees.longest + num_added_keys(model) <= unchanged_length(model)
    )


def _forward_paths(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, trees: Trees
) -> Tensor:
    """Computes each path as a document of its own; a prompt has the results of its first path."""
    paths = trees.paths.to(input_ids.device)
    columns = (None if each is None else each[:, paths.index_M] for each in (input_ids, position_ids, token_type_ids))
    ids, positions, types = columns
    assert ids is not None and positions is not None
    hidden_1NH = _forward_packed(model, ids, positions, paths.cu_seqlens, types).index_select(1, paths.place_N)
    return nn.functional.pad(hidden_1NH, (0, 0, 0, input_ids.shape[1] - hidden_1NH.shape[1]))


def call_packed(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    run: Callable[[PreTrainedModel, dict[str, Any]], Result],
    token_type_ids: Tensor | None = None,
    trees: Trees | None = None,
) -> Result:
    """Calls ``run(model, arguments)`` with the arguments that make a model or its base compute documents packed.

    Trees must be such that :func:`shares_prompts`. Virtual ids are in the row already; keys of an adapter move it.
    """
    layout, boundaries = layout_of(model), boundaries_of(model)
    first_position = layout.first_position + num_added_keys(model)
    if token_type_ids is None and layout.passes_types:
        token_type_ids = torch.zeros_like(input_ids)
    types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": _bounds(layout, cu_seqlens, trees) if layout.takes_bounds else None,
        "position_ids": position_ids + first_position if first_position else position_ids,
        "use_cache": False,
        **types,
    }
    if not layout.described and trees is None:  # boundaries do not say which documents continue others
        arguments |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        if cu_seqlens.is_cuda:  # found once here, because every layer would wait for the device
            longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
            arguments |= {"max_length_q": longest, "max_length_k": longest}
    held = layout.dealt or layout.has_distances
    documents = _documents(layout, cu_seqlens, trees) if held else None
    with nullcontext() if boundaries is None else boundaries.holding(documents):
        return run(model, arguments)


def forward_stored(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, longest: int, store: KeyStore
) -> Tensor:
    """Returns the input of the output layer for single tokens of texts whose earlier keys are stored, ``[1, M, H]``.

    Args:
        model: A model for which :func:`why_nothing_is_stored` is None.
        input_ids: ``[1, M]``.
        position_ids: ``[1, M]``.
        longest: Tokens of the longest text that the store has room for.
        store: It knows which texts the tokens continue.
    """
    layout = layout_of(model)
    mask = make_bounds(torch.tensor([0, longest], device=input_ids.device), described=layout.described)
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": keep_in(mask, store),
        "position_ids": position_ids + layout.first_position,
        "use_cache": False,
    }
    if layout.passes_types:
        arguments["token_type_ids"] = torch.zeros_like(input_ids)
    return run_to_head(model, arguments)


def why_nothing_is_stored(model: PreTrainedModel) -> str | None:
    """Returns why :func:`forward_stored` cannot compute a model; None if it can."""
    layout = layout_of(model)
    if kind_of(model.config) != "causal":
        return "it is no language model that only sees earlier tokens"
    if layout.kind != "packed":
        return "some of its layers keep more than keys and values, or it cannot be packed"
    if not layout.takes_bounds or layout.has_distances:
        return "its attention needs more than keys and values"
    if virtual_length(model):
        return "virtual tokens come before every text"
    return None


def _bounds(layout: Layout, cu_seqlens: Tensor, trees: Trees | None) -> Tensor:
    return make_bounds(cu_seqlens, parents=None if trees is None else trees.parents, described=layout.described)


def _documents(layout: Layout, cu_seqlens: Tensor, trees: Trees | None) -> Documents:
    padding = 0.0 if layout.equal else PADDING
    if trees is None:
        return Documents.of(cu_seqlens, padding=padding)
    documents = Documents.of_trees(trees, cu_seqlens.device, padding=padding)
    if not layout.continued:
        return documents
    steps = Steps.of(trees, cu_seqlens.device, padding=padding)
    pays = places(steps.documents, layout.chunk) < places(documents, layout.chunk)
    return replace(documents, steps=steps) if pays else documents


def _forward_rows(model: PreTrainedModel, layout: Layout, columns: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
    """Computes each document in a row of its own, with the architecture's own mask and positions."""
    documents = Documents.of(cu_seqlens, padding=padding_of(model))
    fill = padding_id(model.config)
    rows = []
    for group in documents.groups:
        arguments: dict[str, Any] = {name: group.deal(column[0]) for name, column in columns.items()}
        arguments["input_ids"] = arguments["input_ids"].masked_fill(~group.real_DL, fill)
        mask = None if layout.kind == "equal_rows" else group.real_DL.long()
        rows.append(run_to_head(model, {**arguments, "attention_mask": mask, "use_cache": False}))
    hidden_MH = documents.collect(rows)
    return nn.functional.pad(hidden_MH, (0, 0, 0, columns["input_ids"].shape[1] - len(hidden_MH)))[None]
